module get-secret

go 1.19

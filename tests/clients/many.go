// ResponseType 0: Go's net/http with its default client. Arguments: URL of the agent, token.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"os"
	"sync"
)

var connections int

func ask(method, path string, body io.Reader) (int, string) {
	request, err := http.NewRequest(method, os.Args[1]+path, body)
	check(err)
	request.Header.Set("X-KMS-Token", os.Args[2])
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
		if !info.Reused {
			connections++
		}
	}}
	if body == nil {
		request = request.WithContext(httptrace.WithClientTrace(request.Context(), trace))
	}
	reply, err := http.DefaultClient.Do(request)
	check(err)
	defer reply.Body.Close()
	content, err := io.ReadAll(reply.Body)
	check(err)
	var secret struct{ SecretData, Code string }
	if len(content) > 0 {
		check(json.Unmarshal(content, &secret))
	}
	return reply.StatusCode, secret.SecretData + secret.Code
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func expect(status int, text, method, path string, body io.Reader) {
	if gotStatus, gotText := ask(method, path, body); gotStatus != status || gotText != text {
		panic(fmt.Sprint(method, " ", path, ": ", gotStatus, " ", gotText))
	}
}

func main() {
	for number := 0; number < 50; number++ {
		expect(200, "1", "GET", "/secretsmanager/get?secretId=a", nil)
		expect(404, "Forbidden.ResourceNotFound", "GET", "/v1/missing", nil)
	}
	if connections != 1 {
		panic(fmt.Sprint(connections, " connections"))
	}
	expect(200, "", "HEAD", "/v1/a", nil)
	expect(405, "MethodNotAllowed", "POST", "/v1/a", bytes.NewReader(make([]byte, 100_000)))
	var group sync.WaitGroup
	for number := 0; number < 50; number++ {
		group.Add(1)
		go func() {
			defer group.Done()
			expect(200, "1", "GET", "/v1/a", http.NoBody)
		}()
	}
	group.Wait()
	fmt.Println("ok")
}

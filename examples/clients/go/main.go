// Asks kms-agent for a secret and prints its value:  go run . NAME
//
// Go's standard library only. The token: KMS_TOKEN (the token itself, or file:///path), else the file
// /var/run/kmstoken. The agent: KMS_AGENT, else http://localhost:2025.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// No proxy: it would learn both token and secret. One client for the whole program keeps its connection.
var client = &http.Client{Transport: &http.Transport{Proxy: nil}, Timeout: 15 * time.Second}

// token is read for each request: it may be rotated while a program runs.
func token() (string, error) {
	value, set := os.LookupEnv("KMS_TOKEN")
	if !set {
		value = "file:///var/run/kmstoken"
	}
	if path := strings.TrimPrefix(value, "file://"); path != value {
		bytes, err := os.ReadFile(path)
		return strings.TrimSpace(string(bytes)), err
	}
	return strings.TrimSpace(value), nil
}

func getSecret(name string) (string, error) {
	agent := os.Getenv("KMS_AGENT")
	if agent == "" {
		agent = "http://localhost:2025"
	}
	query := url.Values{"secretId": {name}}
	request, err := http.NewRequest(http.MethodGet, agent+"/secretsmanager/get?"+query.Encode(), nil)
	if err != nil {
		return "", err
	}
	token, err := token()
	if err != nil {
		return "", err
	}
	request.Header.Set("X-KMS-Token", token)
	reply, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer reply.Body.Close()
	body, err := io.ReadAll(reply.Body)
	if err != nil {
		return "", err
	}
	if reply.StatusCode != http.StatusOK {
		// The body says why: {"Code": .., "Message": .., "RequestId": ..}
		return "", fmt.Errorf("%s %s", reply.Status, body)
	}
	var secret struct{ SecretData string }
	err = json.Unmarshal(body, &secret)
	return secret.SecretData, err
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run . NAME")
		os.Exit(2)
	}
	value, err := getSecret(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(value)
}

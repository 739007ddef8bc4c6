package ecr

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

const (
	maxAnswer  = 1 << 20
	maxMessage = 400
	tries      = 3
)

func apiClient() *http.Client { return client(http.ProxyFromEnvironment, 10*time.Second) }

// localClient is for services beside this process, which answer at once or are not there.
func localClient() *http.Client { return client(nil, 2*time.Second) }

func client(proxy func(*http.Request) (*url.URL, error), answer time.Duration) *http.Client {
	return &http.Client{
		Transport: bounded{&http.Transport{
			Proxy:                  proxy,
			DialContext:            (&net.Dialer{Timeout: answer}).DialContext,
			TLSHandshakeTimeout:    answer,
			ResponseHeaderTimeout:  answer,
			MaxResponseHeaderBytes: 64 << 10,
			IdleConnTimeout:        30 * time.Second,
		}},
		// Credentials go where they were meant to go, or nowhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// bounded cuts answers off.
type bounded struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxAnswer), resp.Body}
	return resp, nil
}

// fetch gets something from a service beside this process, a second time if that
// fails in a way that may pass.
func fetch(ctx context.Context, from *http.Client, method, url string, header map[string]string, secrets ...string) ([]byte, error) {
	answer, again, err := fetchOnce(ctx, from, method, url, header, secrets)
	if again && ctx.Err() == nil {
		answer, _, err = fetchOnce(ctx, from, method, url, header, secrets)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", host(url), err)
	}
	return answer, nil
}

func fetchOnce(ctx context.Context, from *http.Client, method, url string, header map[string]string, secrets []string) (answer []byte, again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return nil, false, errors.New("not a URL")
	}
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := from.Do(req)
	if err != nil {
		return nil, false, bare(err)
	}
	defer resp.Body.Close()
	if answer, err = io.ReadAll(resp.Body); err != nil {
		return nil, true, err
	}
	if resp.StatusCode != http.StatusOK {
		c := call{secrets: secrets}
		return nil, resp.StatusCode >= 500, c.failure(resp.StatusCode, answer)
	}
	return answer, false, nil
}

// call is one request to an AWS service.
type call struct {
	name            string // as permissions have it: "ecr:GetAuthorizationToken"
	service, region string // what the signature is for
	url             string
	header          map[string]string
	body            string
	creds           *aws.Credentials // nil: not signed
	secrets         []string         // not to be in an error, besides those of creds
}

// do sends a call, a few times if need be, and returns the answer.
func (l *Login) do(ctx context.Context, c call) ([]byte, error) {
	var err error
	for try := range tries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			case <-time.After(time.Duration(try) * 300 * time.Millisecond):
			}
		}
		var answer []byte
		var again bool
		if answer, again, err = l.once(ctx, c); err == nil {
			return answer, nil
		}
		if !again {
			break
		}
	}
	return nil, fmt.Errorf("%s at %s: %w", c.name, host(c.url), err)
}

// once sends a call; again says that a failure may pass.
func (l *Login) once(ctx context.Context, c call) (answer []byte, again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, strings.NewReader(c.body))
	if err != nil {
		return nil, false, errors.New("the endpoint is not a URL")
	}
	for k, v := range c.header {
		req.Header.Set(k, v)
	}
	if c.creds != nil {
		sum := fmt.Sprintf("%x", sha256.Sum256([]byte(c.body)))
		if err := v4.NewSigner().SignHTTP(ctx, *c.creds, req, sum, c.service, c.region, time.Now()); err != nil {
			return nil, false, fmt.Errorf("sign the request: %w", err)
		}
	}
	resp, err := l.api.Do(req)
	if err != nil {
		return nil, true, bare(err)
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	if err != nil {
		return nil, true, err
	}
	if resp.StatusCode == http.StatusOK {
		return answer, false, nil
	}
	code, _ := readFailure(answer)
	again = resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests || strings.HasPrefix(code, "Throttling")
	return nil, again, c.failure(resp.StatusCode, answer)
}

// failure is the error for an answer that is not 200.
func (c *call) failure(status int, answer []byte) error {
	text := fmt.Sprintf("%d %s", status, http.StatusText(status))
	code, message := readFailure(answer)
	for _, s := range []string{code, c.scrub(message)} {
		if s != "" {
			text += ": " + s
		}
	}
	return errors.New(text)
}

// scrub takes secrets out of what a service says: it repeats signed headers
// when it does not like the signature.
func (c *call) scrub(s string) string {
	secrets := c.secrets
	if c.creds != nil {
		secrets = append(secrets, c.creds.SessionToken, c.creds.SecretAccessKey)
	}
	for _, v := range secrets {
		if v != "" {
			s = strings.ReplaceAll(s, v, "***")
		}
	}
	return clean(s)
}

// readFailure takes the answers of services that speak JSON and those that speak XML.
func readFailure(answer []byte) (code, message string) {
	var j struct {
		Type    string `json:"__type"`
		Code    string `json:"code"`    // of containers' services
		Message string `json:"message"` // or Message: case does not matter here
	}
	if json.Unmarshal(answer, &j) == nil {
		return clean(j.Type[strings.LastIndexByte(j.Type, '#')+1:] + j.Code), j.Message
	}
	var x struct {
		Code    string `xml:"Error>Code"`
		Message string `xml:"Error>Message"`
	}
	if xml.Unmarshal(bytes.TrimSpace(answer), &x) == nil {
		return clean(x.Code), x.Message
	}
	return "", ""
}

// clean makes text from outside fit for one line.
func clean(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }), " ")
	if len(s) > maxMessage {
		s = strings.ToValidUTF8(s[:maxMessage], "") + "…"
	}
	return s
}

// bare takes the URL off an error of net/http.
func bare(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func host(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" {
		return "the configured endpoint"
	}
	return u.Host
}

package ecr

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// fakeAWS is not AWS: it answers the few calls as AWS' documentation says, and
// believes only signatures that it can make again with a key that it knows.
type fakeAWS struct {
	*httptest.Server
	// keys are all credentials that it accepts, by access key.
	keys map[string]aws.Credentials
	life time.Duration

	mu    sync.Mutex
	calls []string
	fail  []http.HandlerFunc // for the next calls, one each
}

func newFakeAWS(t *testing.T) *fakeAWS {
	f := &fakeAWS{life: time.Hour, keys: map[string]aws.Credentials{}}
	f.Server = httptest.NewServer(f)
	t.Cleanup(f.Close)
	for _, k := range []string{"ENV", "PROFILE", "PROCESS", "CONTAINER", "INSTANCE", "ROLE", "WEB"} {
		f.keys["AKID"+k] = aws.Credentials{AccessKeyID: "AKID" + k, SecretAccessKey: "secret-of-" + k, SessionToken: "session-of-" + k}
	}
	// Nothing of the machine's own.
	for _, v := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
		"AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_ENDPOINT_URL", "HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy",
	} {
		t.Setenv(v, "")
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_CONFIG_FILE", "/does/not/exist")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/does/not/exist")
	t.Setenv("AWS_ENDPOINT_URL_ECR", f.URL+"/ecr")
	t.Setenv("AWS_ENDPOINT_URL_ECR_PUBLIC", f.URL+"/ecr-public")
	t.Setenv("AWS_ENDPOINT_URL_STS", f.URL+"/sts")
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")
	return f
}

func (f *fakeAWS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	f.mu.Lock()
	defer f.mu.Unlock()
	form, _ := url.ParseQuery(string(body))
	f.calls = append(f.calls, strings.Trim(r.Method+" "+r.URL.Path+" "+form.Get("Action"), " "))
	if len(f.fail) > 0 {
		h := f.fail[0]
		f.fail = f.fail[1:]
		h(w, r)
		return
	}
	switch r.URL.Path {
	case "/ecr/", "/ecr-public/":
		f.token(w, r, body)
	case "/sts/":
		f.sts(w, r, body, form)
	case "/container":
		if r.Header.Get("Authorization") != "pod-token" {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprintf(w, `{"code":"AccessDenied","message":"the token %s is not good"}`, r.Header.Get("Authorization"))
			return
		}
		k := f.keys["AKIDCONTAINER"]
		fmt.Fprintf(w, `{"AccessKeyId":%q,"SecretAccessKey":%q,"Token":%q,"Expiration":%q}`,
			k.AccessKeyID, k.SecretAccessKey, k.SessionToken, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	default:
		f.metadata(w, r)
	}
}

// signer is the key that has signed a request, if the signature is right.
func (f *fakeAWS) signer(r *http.Request, body []byte, service string) (string, bool) {
	var date time.Time
	auth := r.Header.Get("Authorization")
	rest, ok := strings.CutPrefix(auth, "AWS4-HMAC-SHA256 Credential=")
	scope := strings.Split(rest, "/")
	if !ok || len(scope) < 4 || scope[3] != service {
		return "", false
	}
	k, known := f.keys[scope[0]]
	date, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || !known {
		return "", false
	}
	again, _ := http.NewRequest(r.Method, f.URL+r.URL.Path, bytes.NewReader(body))
	for _, h := range []string{"Content-Type", "X-Amz-Target"} {
		if v := r.Header.Get(h); v != "" {
			again.Header.Set(h, v)
		}
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(body))
	if err := v4.NewSigner().SignHTTP(r.Context(), k, again, sum, service, scope[2], date); err != nil {
		return "", false
	}
	return k.AccessKeyID, again.Header.Get("Authorization") == auth && r.Header.Get("X-Amz-Security-Token") == k.SessionToken
}

func (f *fakeAWS) token(w http.ResponseWriter, r *http.Request, body []byte) {
	service := strings.Trim(r.URL.Path, "/")
	target := map[string]string{
		"ecr":        "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken",
		"ecr-public": "SpencerFrontendService.GetAuthorizationToken",
	}[service]
	k, ok := f.signer(r, body, service)
	if !ok || r.Header.Get("X-Amz-Target") != target || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
		w.WriteHeader(http.StatusBadRequest)
		// As AWS does: what was signed is in the message.
		fmt.Fprintf(w, `{"__type":"com.amazon.coral.service#InvalidSignatureException","message":"The request signature we calculated does not match. `+
			`The Canonical String should have been 'x-amz-security-token:%s'"}`, r.Header.Get("X-Amz-Security-Token"))
		return
	}
	token := base64.StdEncoding.EncodeToString([]byte("AWS:password-for-" + k))
	one := fmt.Sprintf(`{"authorizationToken":%q,"expiresAt":%d.5}`, token, time.Now().Add(f.life).Unix())
	if service == "ecr" {
		one = "[" + one + "]"
	}
	fmt.Fprintf(w, `{"authorizationData":%s}`, one)
}

func (f *fakeAWS) sts(w http.ResponseWriter, r *http.Request, body []byte, form url.Values) {
	action, refused := form.Get("Action"), ""
	key := "AKIDROLE"
	if action == "AssumeRoleWithWebIdentity" {
		key = "AKIDWEB"
		if form.Get("WebIdentityToken") != "service-account-token" {
			refused = "the token " + form.Get("WebIdentityToken") + " has expired"
		}
	} else if _, ok := f.signer(r, body, "sts"); !ok {
		refused = "the signature does not match"
	}
	if refused != "" || !strings.HasPrefix(form.Get("RoleArn"), "arn:aws:iam::123456789012:role/") {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>%s</Message></Error></ErrorResponse>`, refused)
		return
	}
	k := f.keys[key]
	fmt.Fprintf(w, `<?xml version="1.0"?><%[1]sResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><%[1]sResult><Credentials><AccessKeyId>%[2]s</AccessKeyId>`+
		`<SecretAccessKey>%[3]s</SecretAccessKey><SessionToken>%[4]s</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></%[1]sResult></%[1]sResponse>`,
		action, k.AccessKeyID, k.SecretAccessKey, k.SessionToken)
}

// metadata is EC2's service, version 2: without its token it tells nothing.
func (f *fakeAWS) metadata(w http.ResponseWriter, r *http.Request) {
	const base = "/latest/meta-data/iam/security-credentials/"
	switch {
	case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "300")
		fmt.Fprint(w, "metadata-token")
	case r.Header.Get("X-Aws-Ec2-Metadata-Token") != "metadata-token":
		w.WriteHeader(http.StatusUnauthorized)
	case r.URL.Path == base:
		fmt.Fprint(w, "node-role")
	case r.URL.Path == base+"node-role":
		k := f.keys["AKIDINSTANCE"]
		fmt.Fprintf(w, `{"Code":"Success","Type":"AWS-HMAC","AccessKeyId":%q,"SecretAccessKey":%q,"Token":%q,"Expiration":%q}`,
			k.AccessKeyID, k.SecretAccessKey, k.SessionToken, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func (f *fakeAWS) made() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fakeAWS) failNext(h ...http.HandlerFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = h
}

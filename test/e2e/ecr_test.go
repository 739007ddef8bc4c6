package e2e

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// TestFakeECR pushes to a registry under the name of one of Amazon's, with
// nothing but what a pod of EKS has: a service account's token, and a config.json
// without secrets. A proxy leads from Amazon's names to a registry and to a fake
// of AWS here: nothing of this is Amazon.
func TestFakeECR(t *testing.T) {
	guard(t)
	const (
		host = "123456789012.dkr.ecr.us-east-1.amazonaws.com"
		api  = "api.ecr.us-east-1.amazonaws.com"
		sts  = "sts.us-east-1.amazonaws.com"
		role = "arn:aws:iam::123456789012:role/pusher"
	)
	shared := kilnrun.Open(t, "library/busybox:latest").Runner
	for _, c := range []struct {
		name   string
		config string
		token  string // of the service account
		wants  []string
		calls  []string
	}{
		{"credHelpers", `{"credHelpers": {"` + host + `": "ecr-login"}}`, "service-account-token", nil, []string{"AssumeRoleWithWebIdentity", "GetAuthorizationToken"}},
		{"credsStore", `{"credsStore": "ecr-login"}`, "service-account-token", nil, []string{"AssumeRoleWithWebIdentity", "GetAuthorizationToken"}},
		{"stale token", `{"credsStore": "ecr-login"}`, "stale-pass-word-1234", []string{
			host, "ecr-login", "web identity", "AWS_WEB_IDENTITY_TOKEN_FILE", "sts:AssumeRoleWithWebIdentity at " + sts, "AccessDenied", "*** has expired",
		}, []string{"AssumeRoleWithWebIdentity"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := newAccess(t, shared, registrytest.Options{TLS: true, User: "AWS", Password: password}, host)
			cloud := newFakeCloud(t, api, sts)
			a.host = host
			a.proxy = newProxy(t, map[string]string{host + ":443": a.registry.Host(), api + ":443": cloud.Listener.Addr().String(), sts + ":443": cloud.Listener.Addr().String()})
			a.pem = append(a.pem, cloud.pem...)
			a.trust()
			a.env = append(a.env, "DOCKER_CONFIG="+a.config("docker/config.json", []byte(c.config)), "HTTPS_PROXY="+a.proxy.URL, "AWS_REGION=us-east-1",
				"AWS_ROLE_ARN="+role, "AWS_WEB_IDENTITY_TOKEN_FILE="+put(t, filepath.Join(a.dir, "token"), []byte(c.token)))
			a.wants = c.wants
			out, code := a.build()
			if len(c.wants) > 0 {
				a.failed(out, code)
			} else if code != 0 {
				t.Fatalf("kiln build exits with %d:\n%s", code, out)
			} else {
				a.pushed()
			}
			a.silent(out)
			if got := cloud.made(); !slices.Equal(got, c.calls) {
				t.Errorf("AWS was asked for %q, want %q", got, c.calls)
			}
		})
	}
}

// fakeCloud answers as STS and ECR do, once it is told the right token and the
// right key. (Package ecr's own tests have a fake that checks signatures.)
type fakeCloud struct {
	*httptest.Server
	pem []byte

	mu    sync.Mutex
	calls []string
}

func newFakeCloud(t *testing.T, names ...string) *fakeCloud {
	t.Helper()
	f := &fakeCloud{}
	cert, pem := selfSigned(t, names...)
	f.pem = pem
	f.Server = httptest.NewUnstartedServer(f)
	f.TLS = &tls.Config{Certificates: []tls.Certificate{*cert}}
	f.StartTLS()
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
	})
	return f
}

func (f *fakeCloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	form, _ := url.ParseQuery(string(body))
	_, target, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	f.mu.Lock()
	f.calls = append(f.calls, target+form.Get("Action"))
	f.mu.Unlock()
	switch {
	case form.Get("WebIdentityToken") == "service-account-token":
		fmt.Fprint(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>`+
			`<AccessKeyId>AKIDWEB</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`)
	case form.Get("Action") != "":
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `<ErrorResponse><Error><Code>AccessDenied</Code><Message>%s has expired</Message></Error></ErrorResponse>`, form.Get("WebIdentityToken"))
	case strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential=AKIDWEB/") && r.Header.Get("X-Amz-Security-Token") == "t":
		fmt.Fprintf(w, `{"authorizationData":[{"authorizationToken":%q,"expiresAt":%d}]}`,
			base64.StdEncoding.EncodeToString([]byte("AWS:"+password)), time.Now().Add(12*time.Hour).Unix())
	default:
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprint(w, `{"__type":"UnrecognizedClientException","message":"The security token included in the request is invalid."}`)
	}
}

func (f *fakeCloud) made() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

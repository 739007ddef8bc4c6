package ecr

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const private = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"

func write(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestFakeAWSSources gets a password with credentials from each place.
func TestFakeAWSSources(t *testing.T) {
	const role = "arn:aws:iam::123456789012:role/pusher"
	keysOf := func(k string) string {
		return "aws_access_key_id = AKID" + k + "\naws_secret_access_key = secret-of-" + k + "\naws_session_token = session-of-" + k + "\n"
	}
	env := func(t *testing.T, _ *fakeAWS) {
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIDENV")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "secret-of-ENV")
		t.Setenv("AWS_SESSION_TOKEN", "session-of-ENV")
	}
	web := func(t *testing.T, _ *fakeAWS) {
		t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", write(t, "token", "service-account-token\n"))
		t.Setenv("AWS_ROLE_ARN", role)
	}
	container := func(t *testing.T, f *fakeAWS) {
		t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f.URL+"/container")
		t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", write(t, "token", "pod-token\n"))
	}
	instance := func(t *testing.T, f *fakeAWS) { t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f.URL) }
	config := func(text string) func(*testing.T, *fakeAWS) {
		return func(t *testing.T, _ *fakeAWS) { t.Setenv("AWS_CONFIG_FILE", write(t, "config", text)) }
	}
	all := func(set ...func(*testing.T, *fakeAWS)) func(*testing.T, *fakeAWS) {
		return func(t *testing.T, f *fakeAWS) {
			for _, s := range set {
				s(t, f)
			}
		}
	}
	for _, c := range []struct {
		name   string
		set    func(*testing.T, *fakeAWS)
		key    string
		source string
		calls  []string
	}{
		{"environment", env, "ENV", "the environment", []string{"POST /ecr/"}},
		{"web identity", web, "WEB", "web identity, role " + role, []string{"POST /sts/ AssumeRoleWithWebIdentity", "POST /ecr/"}},
		{"EKS Pod Identity", container, "CONTAINER", "AWS_CONTAINER_CREDENTIALS_FULL_URI", []string{"GET /container", "POST /ecr/"}},
		{"instance", instance, "INSTANCE", "instance's metadata", []string{
			"PUT /latest/api/token", "GET /latest/meta-data/iam/security-credentials/", "GET /latest/meta-data/iam/security-credentials/node-role", "POST /ecr/",
		}},
		{"default profile", config("[default]\n" + keysOf("PROFILE")), "PROFILE", `profile "default"`, []string{"POST /ecr/"}},
		{"credentials file", func(t *testing.T, _ *fakeAWS) {
			t.Setenv("AWS_SHARED_CREDENTIALS_FILE", write(t, "credentials", "[default]\n"+keysOf("PROFILE")))
		}, "PROFILE", `profile "default"`, []string{"POST /ecr/"}},
		{"role of a profile", func(t *testing.T, f *fakeAWS) {
			config("[profile base]\n"+keysOf("PROFILE")+"[profile ci]\nsource_profile = base\nrole_arn = "+role+"\nexternal_id = x\n")(t, f)
			t.Setenv("AWS_PROFILE", "ci")
		}, "ROLE", "role " + role, []string{"POST /sts/ AssumeRole", "POST /ecr/"}},
		{"role by the instance", all(instance, config("[default]\ncredential_source = Ec2InstanceMetadata\nrole_arn = "+role+"\n")), "ROLE", "role " + role, []string{
			"PUT /latest/api/token", "GET /latest/meta-data/iam/security-credentials/", "GET /latest/meta-data/iam/security-credentials/node-role", "POST /sts/ AssumeRole", "POST /ecr/",
		}},
		{"web identity of a profile", func(t *testing.T, f *fakeAWS) {
			config("[default]\nrole_arn = "+role+"\nweb_identity_token_file = "+write(t, "token", "service-account-token")+"\n")(t, f)
		}, "WEB", "web identity", []string{"POST /sts/ AssumeRoleWithWebIdentity", "POST /ecr/"}},
		{
			"process", config(`[default]` + "\n" + `credential_process = echo '{"Version":1,"AccessKeyId":"AKIDPROCESS","SecretAccessKey":"secret-of-PROCESS","SessionToken":"session-of-PROCESS"}'` + "\n"),
			"PROCESS", "credential_process",
			[]string{"POST /ecr/"},
		},
		{"environment before all", all(env, web, container, instance), "ENV", "the environment", []string{"POST /ecr/"}},
		{"web identity before containers", all(web, container, instance), "WEB", "web identity", []string{"POST /sts/ AssumeRoleWithWebIdentity", "POST /ecr/"}},
		{"container before the instance", all(container, instance), "CONTAINER", "container", []string{"GET /container", "POST /ecr/"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeAWS(t)
			c.set(t, f)
			p, err := New().Password(t.Context(), private)
			if err != nil {
				t.Fatal(err)
			}
			if p.User != "AWS" || p.Secret != "password-for-AKID"+c.key {
				t.Errorf("user %q, password %q", p.User, p.Secret)
			}
			if !strings.Contains(p.Source, c.source) {
				t.Errorf("source %q, want %q in it", p.Source, c.source)
			}
			if got := f.made(); !slices.Equal(got, c.calls) {
				t.Errorf("calls %q, want %q", got, c.calls)
			}
		})
	}
}

// TestFakeAWSFailures: every error says where the credentials were from and
// what was wrong, and none has a secret.
func TestFakeAWSFailures(t *testing.T) {
	env := func(t *testing.T, secret string) {
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIDENV")
		t.Setenv("AWS_SECRET_ACCESS_KEY", secret)
		t.Setenv("AWS_SESSION_TOKEN", "session-of-ENV")
	}
	answer := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}
	}
	for _, c := range []struct {
		name string
		set  func(*testing.T, *fakeAWS)
		want []string
	}{
		{"none", func(*testing.T, *fakeAWS) {}, []string{"no AWS credentials", "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", `profile "default"`, "connection refused"}},
		{"metadata switched off", func(t *testing.T, _ *fakeAWS) { t.Setenv("AWS_EC2_METADATA_DISABLED", "true") }, []string{"no AWS credentials"}},
		{"wrong key", func(t *testing.T, _ *fakeAWS) { env(t, "secret-wrong") }, []string{"from the environment", "ecr:GetAuthorizationToken at 127.0.0.1", "400", "InvalidSignatureException", "x-amz-security-token:***"}},
		{"not allowed", func(t *testing.T, f *fakeAWS) {
			env(t, "secret-of-ENV")
			f.failNext(answer(400, `{"__type":"AccessDeniedException","Message":"User: arn:aws:iam::1:user/x is not authorized to perform: ecr:GetAuthorizationToken"}`))
		}, []string{"AccessDeniedException: User: arn:aws:iam::1:user/x is not authorized"}},
		{"stale token of a pod", func(t *testing.T, _ *fakeAWS) {
			t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", write(t, "token", "secret-stale-token"))
			t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pusher")
		}, []string{"web identity", "sts:AssumeRoleWithWebIdentity", "AccessDenied", "the token *** has expired"}},
		{"no role", func(t *testing.T, _ *fakeAWS) { t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", write(t, "token", "x")) }, []string{"AWS_ROLE_ARN"}},
		{"no token file", func(t *testing.T, _ *fakeAWS) {
			t.Setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/does/not/exist/token")
			t.Setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pusher")
		}, []string{"/does/not/exist/token"}},
		{"container refuses", func(t *testing.T, f *fakeAWS) {
			t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f.URL+"/container")
			t.Setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "secret-of-the-pod")
		}, []string{"AWS_CONTAINER_CREDENTIALS_FULL_URI", "the token *** is not good"}},
		{"container elsewhere", func(t *testing.T, _ *fakeAWS) {
			t.Setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://evil.example/x")
		}, []string{`plain HTTP to "evil.example" is not allowed`}},
		{"no such profile", func(t *testing.T, _ *fakeAWS) { t.Setenv("AWS_PROFILE", "ghost") }, []string{`profile "ghost" does not exist`}},
		{"single sign-on", func(t *testing.T, _ *fakeAWS) {
			t.Setenv("AWS_CONFIG_FILE", write(t, "config", "[default]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\n[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://x.example\n"))
		}, []string{"SSO", "docker-credential-ecr-login"}},
		{"process fails", func(t *testing.T, _ *fakeAWS) {
			t.Setenv("AWS_CONFIG_FILE", write(t, "config", "[default]\ncredential_process = echo secret-of-process; exit 1\n"))
		}, []string{"credential_process failed"}},
		{"redirect", func(t *testing.T, f *fakeAWS) {
			env(t, "secret-of-ENV")
			f.failNext(func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, f.URL+"/elsewhere", http.StatusTemporaryRedirect)
			})
		}, []string{"307"}},
		{"endless answer", func(t *testing.T, f *fakeAWS) {
			env(t, "secret-of-ENV")
			f.failNext(func(w http.ResponseWriter, _ *http.Request) {
				for range 2000 {
					_, _ = w.Write([]byte(strings.Repeat("x", 1024)))
				}
			})
		}, []string{"not JSON"}},
		{"no token", func(t *testing.T, f *fakeAWS) {
			env(t, "secret-of-ENV")
			f.failNext(answer(200, `{"authorizationData":[]}`))
		}, []string{"no token"}},
		{"token of another kind", func(t *testing.T, f *fakeAWS) {
			env(t, "secret-of-ENV")
			f.failNext(answer(200, `{"authorizationData":[{"authorizationToken":"c2VjcmV0LXRva2Vu"}]}`))
		}, []string{"USER:PASSWORD"}},
		{"not what it should be", func(t *testing.T, f *fakeAWS) {
			env(t, "secret-of-ENV")
			f.failNext(answer(200, `{"authorizationData":"x"}`))
		}, []string{"no token"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFakeAWS(t)
			c.set(t, f)
			_, err := New().Password(t.Context(), private)
			if err == nil {
				t.Fatal("no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("no %q in: %v", w, err)
				}
			}
			for _, s := range []string{"secret-", "session-of"} {
				if strings.Contains(err.Error(), s) {
					t.Errorf("a secret is in: %v", err)
				}
			}
			var none *NoneError
			if errors.As(err, &none) != strings.Contains(c.want[0], "no AWS") {
				t.Errorf("NoneError: %v", err)
			}
		})
	}
}

// TestFakeAWSKeepsPasswords: one call for many who ask at once, until the password's end.
func TestFakeAWSKeepsPasswords(t *testing.T) {
	f := newFakeAWS(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDENV")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret-of-ENV")
	t.Setenv("AWS_SESSION_TOKEN", "session-of-ENV")
	l := New()
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if _, err := l.Password(t.Context(), private); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := f.made(); len(got) != 1 {
		t.Errorf("calls %q, want one", got)
	}
	if _, err := l.Password(t.Context(), "public.ecr.aws"); err != nil {
		t.Error(err)
	}
	if got := f.made(); !slices.Equal(got, []string{"POST /ecr-public/"}) {
		t.Errorf("calls %q", got)
	}
	f.life = early / 2
	l = New()
	for range 2 {
		if _, err := l.Password(t.Context(), private); err != nil {
			t.Error(err)
		}
	}
	if got := f.made(); len(got) != 2 {
		t.Errorf("a password that is about to end is used again: calls %q", got)
	}
}

func TestFakeAWSIsAskedAgain(t *testing.T) {
	f := newFakeAWS(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDENV")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret-of-ENV")
	t.Setenv("AWS_SESSION_TOKEN", "session-of-ENV")
	f.failNext(
		func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) },
		func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"__type":"ThrottlingException","message":"Rate exceeded"}`))
		},
	)
	if _, err := New().Password(t.Context(), private); err != nil {
		t.Error(err)
	}
	if got := f.made(); len(got) != 3 {
		t.Errorf("calls %q", got)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	over := errors.New("the build was cancelled")
	cancel(over)
	if _, err := New().Password(ctx, private); !errors.Is(err, over) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestNoneIsRemembered: waiting for a metadata service that is not there takes seconds.
func TestNoneIsRemembered(t *testing.T) {
	f := newFakeAWS(t)
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f.URL)
	f.failNext(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
	l := New()
	for range 3 {
		var none *NoneError
		if _, err := l.Password(t.Context(), private); !errors.As(err, &none) {
			t.Error(err)
		}
	}
	if got := f.made(); len(got) != 1 {
		t.Errorf("calls %q", got)
	}
}

func TestHosts(t *testing.T) {
	t.Setenv("AWS_ENDPOINT_URL", "")
	t.Setenv("AWS_ENDPOINT_URL_ECR", "")
	t.Setenv("AWS_ENDPOINT_URL_ECR_PUBLIC", "")
	for host, want := range map[string]string{
		"123456789012.dkr.ecr.us-east-1.amazonaws.com":                "https://api.ecr.us-east-1.amazonaws.com",
		"123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com":       "https://ecr-fips.us-gov-west-1.amazonaws.com",
		"123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn":            "https://api.ecr.cn-north-1.amazonaws.com.cn",
		"123456789012.dkr-ecr.eu-west-1.on.aws":                       "https://ecr.eu-west-1.api.aws",
		"123456789012.dkr-ecr-fips.us-east-1.on.aws":                  "https://ecr-fips.us-east-1.api.aws",
		"123456789012.dkr-ecr.cn-north-1.on.amazonwebservices.com.cn": "https://ecr.cn-north-1.api.amazonwebservices.com.cn",
		"123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov":               "https://api.ecr.us-iso-east-1.c2s.ic.gov",
		"public.ecr.aws":     "https://api.ecr-public.us-east-1.amazonaws.com",
		"ecr-public.aws.com": "https://ecr-public.us-east-1.api.aws",

		"docker.io": "",
		"123456789012.dkr.ecr.us-east-1.amazonaws.com.evil.example": "",
		"evil.example/123456789012.dkr.ecr.us-east-1.amazonaws.com": "",
		"123456789012.dkr.ecr.us-east-1.amazonaws.com.cn":           "",
		"1234.dkr.ecr.us-east-1.amazonaws.com":                      "",
		"123456789012.dkr.ecr.us-east-1.evil.example.amazonaws.com": "",
		"123456789012.dkr.ecr.evil.example/us-east-1.amazonaws.com": "",
		"123456789012.dkr.ecr.us-east-1.amazonaws.com:5000":         "",
		"xpublic.ecr.aws": "",
	} {
		r, ok := parseHost(host)
		if ok != (want != "") {
			t.Errorf("%s: %v", host, ok)
		} else if ok && r.endpoint() != want {
			t.Errorf("%s: %s, want %s", host, r.endpoint(), want)
		}
	}
	if got := (&chain{region: "cn-north-1"}).stsEndpoint(); got != "https://sts.cn-north-1.amazonaws.com.cn" {
		t.Error(got)
	}
}

// FuzzAnswers: whatever a service answers, a password is one, and nothing panics.
func FuzzAnswers(f *testing.F) {
	for _, s := range []string{
		`{"authorizationData":[{"authorizationToken":"QVdTOng=","expiresAt":1.5e9}]}`, `{"authorizationData":{"authorizationToken":"QVdTOng="}}`,
		`{"__type":"a#B","message":"m"}`, `<ErrorResponse><Error><Code>C</Code><Message>m</Message></Error></ErrorResponse>`, `{}`, `[]`, `null`, ``,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		p, err := readPassword(answer)
		if err == nil && (p.User == "" || p.Secret == "" || p.Expires.IsZero()) {
			t.Errorf("%+v", p)
		}
		code, _ := readFailure(answer)
		if strings.ContainsAny(code, "\n\x1b") || len(code) > maxMessage+len("…") {
			t.Errorf("code %q", code)
		}
	})
}

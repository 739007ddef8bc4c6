package auth

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

const ecrHost = "123456789012.dkr.ecr.us-east-1.amazonaws.com"

// fakeECR gives out passwords without looking at who asks; package ecr's own
// fake looks.
func fakeECR(t *testing.T) (calls *int) {
	t.Helper()
	calls = new(int)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		*calls++
		fmt.Fprintf(w, `{"authorizationData":[{"authorizationToken":%q,"expiresAt":%d}]}`, b64(fmt.Sprintf("AWS:pw%d", *calls)), time.Now().Add(61*time.Second).Unix())
	}))
	t.Cleanup(s.Close)
	t.Setenv("AWS_ENDPOINT_URL_ECR", s.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKID")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
	return calls
}

func noAWS(t *testing.T) {
	t.Helper()
	for _, v := range []string{
		"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
	} {
		t.Setenv(v, "")
	}
	t.Setenv("AWS_CONFIG_FILE", "/does/not/exist")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/does/not/exist")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
}

func TestBuiltInWithFakeECR(t *testing.T) {
	for config, want := range map[string]map[string]string{
		`{"credHelpers": {"` + ecrHost + `": "ecr-login"}, "auths": {"b.example": {"auth": "` + b64("b:pw") + `"}}}`: {
			ecrHost + "/app": "AWS:pw1", "b.example/app": "b:pw", "999999999999.dkr.ecr.us-east-1.amazonaws.com/app": "none",
		},
		`{"credsStore": "ecr-login", "auths": {"b.example": {"auth": "` + b64("b:pw") + `"}}}`: {
			ecrHost + "/app": "AWS:pw1", "b.example/app": "b:pw", "busybox": "none",
		},
	} {
		for repository, want := range want {
			env(t, map[string]string{".docker/config.json": config})
			noAWS(t)
			fakeECR(t)
			if got, err := lookup(t, repository); err != nil || got != want {
				t.Errorf("%s: %q, %v, want %q", repository, got, err, want)
			}
		}
	}
}

// TestProgramBeforeBuiltIn: who puts docker-credential-ecr-login into PATH means it.
func TestProgramBeforeBuiltIn(t *testing.T) {
	home := env(t, map[string]string{".docker/config.json": `{"credsStore": "ecr-login"}`})
	calls := fakeECR(t)
	dir := filepath.Join(home, "bin")
	write(t, filepath.Join(dir, "docker-credential-ecr-login"), "#!/bin/sh\necho '{\"Username\":\"AWS\",\"Secret\":\"of-the-program\"}'\n", 0o700)
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	if got, err := lookup(t, ecrHost+"/app"); err != nil || got != "AWS:of-the-program" || *calls > 0 {
		t.Errorf("%q, %v, %d calls", got, err, *calls)
	}
}

func TestBuiltInWithoutCredentials(t *testing.T) {
	env(t, map[string]string{".docker/config.json": `{"credsStore": "ecr-login"}`})
	noAWS(t)
	_, err := lookup(t, ecrHost+"/app")
	for _, want := range []string{ecrHost, "ecr-login", "no AWS credentials", "AWS_EC2_METADATA_DISABLED"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
	if got, err := lookup(t, "public.ecr.aws/docker/library/busybox"); err != nil || got != "none" {
		t.Errorf("the public registry without credentials: %q, %v", got, err)
	}
}

// TestBuiltInIsRenewed: a build may take longer than a password lives.
func TestBuiltInIsRenewed(t *testing.T) {
	env(t, map[string]string{".docker/config.json": `{"credsStore": "ecr-login"}`})
	noAWS(t)
	fakeECR(t)
	repo, err := name.NewRepository(ecrHost + "/app")
	if err != nil {
		t.Fatal(err)
	}
	cred, err := Default().ResolveContext(t.Context(), repo)
	if err != nil {
		t.Fatal(err)
	}
	if s := fmt.Sprintf("%v %+v %#v", cred, cred, cred); strings.Contains(s, "pw") || strings.Contains(s, "aws-secret") || !strings.Contains(s, `user "AWS" from Amazon ECR`) {
		t.Errorf("printed as %s", s)
	}
	password := func() string {
		t.Helper()
		cfg, err := authn.Authorization(t.Context(), cred)
		if err != nil {
			t.Fatal(err)
		}
		return cfg.Password
	}
	if got := password(); got != "pw1" {
		t.Errorf("password %q", got)
	}
	time.Sleep(1100 * time.Millisecond) // it lives for 61 s, and is not used in its last minute
	if got := password(); got != "pw2" {
		t.Errorf("password %q later on", got)
	}
}

func TestLoginWithBuiltIn(t *testing.T) {
	home := env(t, map[string]string{".docker/config.json": `{"credsStore": "ecr-login"}`})
	_, _, err := Store(t.Context(), ecrHost, "AWS", "pw")
	if err == nil || !strings.Contains(err.Error(), "AWS credentials") {
		t.Errorf("%v", err)
	}
	if where, plain, err := Store(t.Context(), "b.example", "u", "pw"); err != nil || !plain || where != filepath.Join(home, ".docker", "config.json") {
		t.Errorf("%q, %v, %v", where, plain, err)
	}
	if got, err := lookup(t, "b.example/app"); err != nil || got != "u:pw" {
		t.Errorf("%q, %v", got, err)
	}
	if found, err := Erase(t.Context(), "b.example"); err != nil || !found {
		t.Errorf("%v, %v", found, err)
	}
}

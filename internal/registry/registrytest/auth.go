package registrytest

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
)

const tokenPath = "/test-token"

// tokenService gives out bearer tokens, each for the scopes that it was asked for.
type tokenService struct {
	mu     sync.Mutex
	scopes map[string][]string // of a token
}

// RevokeTokens makes all tokens invalid, as time does.
func (r *Registry) RevokeTokens() {
	if r.tokens != nil {
		r.tokens.mu.Lock()
		defer r.tokens.mu.Unlock()
		clear(r.tokens.scopes)
	}
}

func (r *Registry) authorized(next http.Handler) http.Handler {
	switch {
	case r.opts.Token:
		r.tokens = &tokenService{scopes: map[string][]string{}}
		return r.wantToken(next)
	case r.opts.User != "":
		return r.wantPassword(next)
	}
	return next
}

func (r *Registry) wantPassword(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if user, pass, _ := req.BasicAuth(); user != r.opts.User || pass != r.opts.Password {
			refuse(w, `Basic realm="test"`)
			return
		}
		next.ServeHTTP(w, req)
	})
}

func (r *Registry) wantToken(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == tokenPath {
			r.giveToken(w, req)
			return
		}
		token, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		if !r.tokens.allows(token, req) {
			// By the name that the client knows.
			scheme, _, _ := strings.Cut(r.URL(), "://")
			refuse(w, fmt.Sprintf(`Bearer realm=%q,service="test"`, scheme+"://"+req.Host+tokenPath))
			return
		}
		next.ServeHTTP(w, req)
	})
}

func (r *Registry) giveToken(w http.ResponseWriter, req *http.Request) {
	user, pass, _ := req.BasicAuth()
	if user != r.opts.User || pass != r.opts.Password {
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = fmt.Fprint(w, `{"details":"incorrect username or password"}`)
		return
	}
	token := rand.Text()
	r.tokens.mu.Lock()
	r.tokens.scopes[token] = req.URL.Query()["scope"]
	r.tokens.mu.Unlock()
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "expires_in": 300})
}

// allows reports whether a token is good for a request: for writing to the
// repository, reading it, or reading the one to mount from.
func (t *tokenService) allows(token string, req *http.Request) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	scopes, ok := t.scopes[token]
	if !ok || req.URL.Path == "/v2/" {
		return ok
	}
	repo := strings.TrimPrefix(req.URL.Path, "/v2/")
	for _, part := range []string{"/blobs/", "/manifests/", "/tags/"} {
		if i := strings.LastIndex(repo, part); i >= 0 {
			repo = repo[:i]
		}
	}
	action := "push"
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		action = "pull"
	}
	if from := req.URL.Query().Get("from"); from != "" && !granted(scopes, from, "pull") {
		return false
	}
	return granted(scopes, repo, action)
}

func granted(scopes []string, repo, action string) bool {
	for _, s := range scopes {
		actions, ok := strings.CutPrefix(s, "repository:"+repo+":")
		if ok && strings.Contains(","+actions+",", ","+action+",") {
			return true
		}
	}
	return false
}

func refuse(w http.ResponseWriter, challenge string) {
	w.Header().Set("WWW-Authenticate", challenge)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnauthorized)
	_, _ = fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
}

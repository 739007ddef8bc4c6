package wire

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/kiln-build/kiln/internal/diag"
)

const (
	maxErrorBody    = 64 << 10
	maxErrorMessage = 400
)

// Status is the error that an answer with a status of failure is.
type Status struct {
	Code    int      // of HTTP
	codes   []string // of the registry's errors: "DENIED", "NAME_UNKNOWN"
	message string   // the registry's own, cleaned; may be empty
}

func (e *Status) Error() string {
	s := fmt.Sprintf("%d %s", e.Code, http.StatusText(e.Code))
	if e.message != "" {
		s += ": " + e.message
	}
	return strings.TrimSpace(s)
}

// Has reports whether the registry gave one of its own codes, "NAME_UNKNOWN".
func (e *Status) Has(code string) bool { return slices.Contains(e.codes, code) }

// readStatus makes an error of an answer. It does not close its body.
func readStatus(resp *http.Response) *Status {
	e := &Status{Code: resp.StatusCode}
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody)) // as much as there is
	var body struct {
		Errors []struct {
			Code    string          `json:"code"`
			Message string          `json:"message"`
			Detail  json.RawMessage `json:"detail"`
		} `json:"errors"`
		Message string `json:"message"`
		Details string `json:"details"` // of token services
	}
	if json.Unmarshal(raw, &body) != nil {
		if !IsHTML(raw) {
			e.message = Clean(string(raw))
		}
		return e
	}
	var parts []string
	for _, d := range body.Errors {
		e.codes = append(e.codes, d.Code)
		m := strings.TrimSpace(d.Message)
		if m == "" {
			m = d.Code
		}
		var detail string // objects are for machines
		if json.Unmarshal(d.Detail, &detail) == nil && detail != "" && detail != m {
			m += " (" + detail + ")"
		}
		if !slices.Contains(parts, m) {
			parts = append(parts, m)
		}
	}
	if len(parts) == 0 {
		parts = []string{body.Message + body.Details}
	}
	e.message = Clean(strings.Join(parts, "; "))
	return e
}

func IsHTML(raw []byte) bool {
	s := strings.ToLower(strings.TrimSpace(string(raw[:min(len(raw), 512)])))
	return strings.HasPrefix(s, "<!doctype") || strings.HasPrefix(s, "<html") || strings.HasPrefix(s, "<head") || strings.HasPrefix(s, "<?xml")
}

// Clean makes text from outside fit for one line of a terminal.
func Clean(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r) || r == utf8.RuneError
	}), " ")
	if len(s) > maxErrorMessage {
		s = strings.ToValidUTF8(s[:maxErrorMessage], "") + "…"
	}
	return s
}

// fromTransport translates the errors of go-containerregistry's ping and token
// exchange.
func fromTransport(err error) error {
	var te *transport.Error
	if !errors.As(err, &te) {
		if msg := err.Error(); strings.HasPrefix(msg, "no token in bearer response") {
			return errors.New("the answer has no token") // the rest is the answer, with who knows what
		}
		var syn *json.SyntaxError
		if errors.As(err, &syn) {
			return errors.New("the answer is not JSON")
		}
		return bare(err)
	}
	e := &Status{Code: te.StatusCode}
	var parts []string
	for _, d := range te.Errors {
		e.codes = append(e.codes, string(d.Code))
		parts = append(parts, d.Message)
	}
	e.message = Clean(strings.Join(parts, "; "))
	return e
}

// Fail is the error for what went wrong with a session, nil if err is: what says
// what was done to what, `push to "name"`.
func (s *Session) Fail(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
	var d *diag.Error
	if errors.As(err, &d) && d.Code != 0 {
		return &diag.Error{Err: fmt.Errorf("%s: %w", what, err), Hint: d.Hint, Code: d.Code}
	}
	hint := s.hint(err)
	if d != nil && hint == "" {
		hint = d.Hint
	}
	text := fmt.Sprintf("%s: registry %q, repository %q: %v", what, s.repo.Name, s.repo.Path, err)
	var status *Status
	if errors.As(err, &status) && isAuth(status.Code) {
		text += " (credentials: " + s.described() + ")"
	}
	return &diag.Error{
		Err:  &failure{text: s.scrub(text), err: err},
		Hint: hint,
		Code: diag.ExitRegistry,
	}
}

// failure is an error with its secrets taken out of its text.
type failure struct {
	text string
	err  error
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.err }

func isAuth(code int) bool {
	return code == http.StatusUnauthorized || code == http.StatusForbidden || code == http.StatusNotFound
}

// scrub takes out what a registry may have echoed.
func (s *Session) scrub(text string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.secrets {
		if len(v) >= 3 {
			text = strings.ReplaceAll(text, v, "***")
		}
	}
	return text
}

const proxyHint = "The proxy is from HTTPS_PROXY or HTTP_PROXY in the environment; registries that need none can be listed in NO_PROXY."

// hint says what to do about an error.
func (s *Session) hint(err error) string {
	host := s.repo.Name
	var (
		status    *Status
		plain     *plainHTTPError
		authority x509.UnknownAuthorityError
		cert      *tls.CertificateVerificationError
		dns       *net.DNSError
		proxy     *proxyError
		other     x509.HostnameError
	)
	switch {
	case errors.As(err, &other):
		return fmt.Sprintf("Its certificate is for another name: use that, or, if you trust the network, add --insecure-registry %s.", host)
	case errors.As(err, &proxy) && proxy.code == http.StatusProxyAuthRequired:
		return proxyHint + " It wants a user and a password: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT."
	case errors.As(err, &proxy):
		return proxyHint
	case errors.As(err, &plain):
		return fmt.Sprintf("If %[1]s really has no TLS, and you trust the network, add --insecure-registry %[1]s.", plain.host)
	case isPlain(err):
		return fmt.Sprintf("%[1]s does not speak TLS. If you trust the network, add --insecure-registry %[1]s.", host)
	case errors.As(err, &authority), errors.As(err, &cert):
		return fmt.Sprintf("Trust its certificate: put it into /etc/docker/certs.d/%[1]s or ~/.docker/certs.d/%[1]s as ca.crt, or name it in SSL_CERT_FILE. "+
			"Or, if you trust the network, add --insecure-registry %[1]s.", host)
	case errors.As(err, &dns):
		return fmt.Sprintf("Check the registry's name %q and this machine's DNS.", host)
	case errors.As(err, &status):
		return s.statusHint(status, host)
	}
	return ""
}

func (s *Session) statusHint(e *Status, host string) string {
	anonymous := s.described() == "none"
	switch e.Code {
	case http.StatusUnauthorized, http.StatusForbidden:
		if anonymous {
			return fmt.Sprintf("No credential was found for it: log in with `kiln login %s`, or check the name.", host)
		}
		return fmt.Sprintf("Check that this user may do it, or log in anew with `kiln login %s`.", host)
	case http.StatusNotFound:
		if e.Has("NAME_UNKNOWN") {
			return "Check the name; some registries want the repository to be made before the first push."
		}
		if e.Has("MANIFEST_UNKNOWN") {
			return "Check the image's name and tag."
		}
	case http.StatusRequestEntityTooLarge:
		return "The registry, or a proxy before it, limits the size of uploads: raise its limit."
	case http.StatusProxyAuthRequired:
		return proxyHint
	case http.StatusTooManyRequests:
		if anonymous {
			return fmt.Sprintf("The registry limits anonymous use: log in with `kiln login %s`.", host)
		}
		return "The registry limits how much it is used: try later."
	}
	return ""
}

package registry

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

// statusError is an answer with a status that means failure.
type statusError struct {
	code    int
	codes   []string // of the registry's errors: "DENIED", "NAME_UNKNOWN"
	message string   // the registry's own, cleaned; may be empty
}

func (e *statusError) Error() string {
	s := fmt.Sprintf("%d %s", e.code, http.StatusText(e.code))
	if e.message != "" {
		s += ": " + e.message
	}
	return strings.TrimSpace(s)
}

func (e *statusError) has(code string) bool { return contains(e.codes, code) }

// readStatus makes an error of an answer. It does not close its body.
func readStatus(resp *http.Response) *statusError {
	e := &statusError{code: resp.StatusCode}
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
		if !looksLikeHTML(raw) {
			e.message = clean(string(raw))
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
		if !contains(parts, m) {
			parts = append(parts, m)
		}
	}
	if len(parts) == 0 {
		parts = []string{body.Message + body.Details}
	}
	e.message = clean(strings.Join(parts, "; "))
	return e
}

func looksLikeHTML(raw []byte) bool {
	s := strings.ToLower(strings.TrimSpace(string(raw[:min(len(raw), 512)])))
	return strings.HasPrefix(s, "<!doctype") || strings.HasPrefix(s, "<html") || strings.HasPrefix(s, "<head") || strings.HasPrefix(s, "<?xml")
}

// clean makes text from outside fit for one line of a terminal.
func clean(s string) string {
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
	e := &statusError{code: te.StatusCode}
	var parts []string
	for _, d := range te.Errors {
		e.codes = append(e.codes, string(d.Code))
		parts = append(parts, d.Message)
	}
	e.message = clean(strings.Join(parts, "; "))
	return e
}

// fail is the error for what went wrong with a session: what names the action,
// "pull" or "push", and what it is about.
func (s *session) fail(ctx context.Context, what string, err error) error {
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
	text := fmt.Sprintf("%s: registry %q, repository %q: %v", what, s.target.name(), s.target.path, err)
	var status *statusError
	if errors.As(err, &status) && isAuth(status.code) {
		text += " (credentials: " + s.described() + ")"
	}
	return &diag.Error{
		Err:  &failure{text: s.scrub(text), err: err},
		Hint: s.hint(err),
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
func (s *session) scrub(text string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.secrets {
		if len(v) >= 3 {
			text = strings.ReplaceAll(text, v, "***")
		}
	}
	return text
}

// hint says what to do about an error.
func (s *session) hint(err error) string {
	host := s.target.name()
	var (
		status    *statusError
		plain     *plainHTTPError
		authority x509.UnknownAuthorityError
		cert      *tls.CertificateVerificationError
		dns       *net.DNSError
	)
	switch {
	case errors.As(err, &plain):
		return fmt.Sprintf("If %[1]s really has no TLS, and you trust the network, add --insecure-registry %[1]s.", plain.host)
	case isPlain(err):
		return fmt.Sprintf("%[1]s does not speak TLS. If you trust the network, add --insecure-registry %[1]s.", host)
	case errors.As(err, &authority), errors.As(err, &cert):
		return fmt.Sprintf("Trust its certificate with SSL_CERT_FILE, or, if you trust the network, add --insecure-registry %s.", host)
	case errors.As(err, &dns):
		return fmt.Sprintf("Check the registry's name %q and this machine's DNS.", host)
	case errors.As(err, &status):
		return s.statusHint(status, host)
	}
	return ""
}

func (s *session) statusHint(e *statusError, host string) string {
	anonymous := s.described() == "none"
	switch e.code {
	case http.StatusUnauthorized, http.StatusForbidden:
		if anonymous {
			return fmt.Sprintf("No credential was found for it: log in with `kiln login %s`, or check the name.", host)
		}
		return fmt.Sprintf("Check that this user may do it, or log in anew with `kiln login %s`.", host)
	case http.StatusNotFound:
		if e.has("NAME_UNKNOWN") {
			return "Check the name; some registries want the repository to be made before the first push."
		}
		if e.has("MANIFEST_UNKNOWN") {
			return "Check the image's name and tag."
		}
	case http.StatusRequestEntityTooLarge:
		return "The registry, or a proxy before it, limits the size of uploads: raise its limit."
	case http.StatusTooManyRequests:
		if anonymous {
			return fmt.Sprintf("The registry limits anonymous use: log in with `kiln login %s`.", host)
		}
		return "The registry limits how much it is used: try later."
	}
	return ""
}

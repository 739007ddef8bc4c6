package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/kiln-build/kiln/internal/diag"
)

const (
	// helperTimeout is generous: helpers of clouds ask a service for a token.
	helperTimeout = 30 * time.Second
	// tokenUser is the user name that says the secret is an identity token.
	tokenUser = "<token>"

	maxHelperOutput = 1 << 20
)

// program is one run of a helper, for the client of docker's protocol. Unlike
// the client's own it has a time limit and keeps stderr for the error.
type program struct {
	ctx    context.Context //nolint:containedctx // the client's interface has no place for it
	name   string
	arg    string
	in     io.Reader
	failed error // why the run failed, in our words
}

func (p *program) Input(in io.Reader) { p.in = in }

func (p *program) Output() ([]byte, error) {
	path, err := exec.LookPath(p.name)
	if err != nil {
		p.failed = errors.New("no such program in PATH")
		return nil, p.failed
	}
	ctx, cancel := context.WithTimeout(p.ctx, helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, p.arg)
	var stdout, stderr capped
	cmd.Stdin, cmd.Stdout, cmd.Stderr = p.in, &stdout, &stderr
	cmd.WaitDelay = time.Second // a child that keeps our pipe open does not hold us
	err = cmd.Run()
	switch {
	case p.ctx.Err() != nil:
		p.failed = context.Cause(p.ctx)
	case ctx.Err() != nil:
		p.failed = fmt.Errorf("no answer within %s", helperTimeout)
	case err != nil:
		p.failed = fmt.Errorf("%w: %s", err, firstLine(stderr.String()+"\n"+stdout.String()))
	}
	return stdout.Bytes(), p.failed
}

// capped is a buffer that drops what is beyond its limit.
type capped struct{ bytes.Buffer }

func (b *capped) Write(p []byte) (int, error) {
	if room := maxHelperOutput - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	return s[:min(len(s), 200)]
}

// runHelper runs one action of docker-credential-SUFFIX.
func runHelper(ctx context.Context, suffix, where string, action func(client.ProgramFunc) error) error {
	name := "docker-credential-" + suffix
	if strings.ContainsAny(suffix, `/\`) {
		return diag.New(diag.ExitRegistry, "credential helper %q (%s): not a plain name", suffix, where)
	}
	var last *program
	err := action(func(args ...string) client.Program {
		last = &program{ctx: ctx, name: name, arg: args[0]}
		return last
	})
	switch {
	case err == nil || credentials.IsErrCredentialsNotFound(err):
		return err
	case last != nil && last.failed != nil:
		err = last.failed
	default:
		err = errors.New("the answer is not of docker's protocol") // the error itself may quote the answer
	}
	return diag.New(diag.ExitRegistry, "run credential helper %q: %w", name, err).
		WithHint("The helper is named by %s; install it, log in again, or take it out of that file.", where)
}

// helperGet asks a helper for a credential; nil if it has none.
func helperGet(ctx context.Context, suffix, key, where string) (*Credential, error) {
	var got *credentials.Credentials
	err := runHelper(ctx, suffix, where, func(p client.ProgramFunc) (err error) {
		got, err = client.Get(p, key)
		return err
	})
	if credentials.IsErrCredentialsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c := &Credential{source: "helper docker-credential-" + suffix}
	switch {
	case got.Username == "" && got.Secret == "":
		return nil, nil
	case got.Username == tokenUser:
		c.cfg = authn.AuthConfig{IdentityToken: got.Secret}
	default:
		c.cfg = authn.AuthConfig{Username: got.Username, Password: got.Secret}
	}
	return c, nil
}

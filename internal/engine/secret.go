package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
)

// secret returns a secret's value; ok is false if there is none and it is optional.
func (r *run) secret(ctx context.Context, id string, optional bool) (value []byte, ok bool, err error) {
	err = fs.ErrNotExist
	if r.Secrets != nil {
		value, err = r.Secrets.Secret(ctx, id)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && optional:
		return nil, false, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, false, diag.New(diag.ExitDockerfile, "secret %s: not found", id).
			WithHint("the step needs it: give it with --secret id=%s,src=FILE or --secret id=%s,env=VARIABLE", id, id)
	case err != nil:
		return nil, false, fmt.Errorf("secret %q: %w", id, err)
	case len(value) > secret.MaxSize:
		return nil, false, diag.New(diag.ExitFailure, "secret %q has %d bytes: more than %d are refused", id, len(value), secret.MaxSize)
	}
	return value, true, nil
}

// secretFile makes of s a file with a secret's value; shown is false if there is no such secret.
func (r *run) secretFile(ctx context.Context, m *SecretMount, s *sandbox.Mount, out *stepMounts) (shown bool, err error) {
	value, ok, err := r.secret(ctx, m.ID, m.Optional)
	if !ok {
		return false, err
	}
	out.secrets = append(out.secrets, value)
	s.File = &sandbox.File{Content: value, Mode: m.Owner.Mode, UID: m.Owner.UID, GID: m.Owner.GID}
	return true, nil
}

// secretEnv is a step's environment from secrets.
func (r *run) secretEnv(ctx context.Context, x *Exec, out *stepMounts) (env []string, err error) {
	for _, e := range x.SecretEnv {
		value, _, err := r.secret(ctx, e.ID, e.Optional)
		if err != nil {
			return nil, err
		}
		out.secrets = append(out.secrets, value)
		env = append(env, e.Name+"="+string(value))
	}
	return env, nil
}

// agentSocket makes of s a socket with an SSH agent behind it; shown is false if there is no such agent.
func (r *run) agentSocket(ctx context.Context, m *SSHMount, s *sandbox.Mount) (shown bool, err error) {
	err = &sshagent.NoneError{}
	var c net.Conn
	if r.SSH != nil {
		c, err = r.SSH.DialAgent(ctx, m.ID) // to find out whether there is one
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && m.Optional:
		return false, nil
	case errors.Is(err, fs.ErrNotExist):
		return false, diag.New(diag.ExitDockerfile, "no SSH key %q: %w", m.ID, err).
			WithHint("the step needs it: give it with --ssh %s, --ssh %s=SOCKET or --ssh %s=KEYFILE", m.ID, m.ID, m.ID)
	case err != nil:
		return false, fmt.Errorf("SSH agent %q: %w", m.ID, err)
	}
	c.Close()
	s.Socket = &sandbox.Socket{Mode: m.Owner.Mode, UID: m.Owner.UID, GID: m.Owner.GID, Dial: func(ctx context.Context) (net.Conn, error) {
		c, err := r.SSH.DialAgent(ctx, m.ID)
		if err != nil && ctx.Err() == nil {
			r.Progress.Warn(fmt.Sprintf("SSH agent %q: %v", m.ID, err))
		}
		return c, err
	}}
	return true, nil
}

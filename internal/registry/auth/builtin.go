package auth

import (
	"context"
	"errors"
	"os/exec"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/auth/ecr"
)

// ecrLogin is the name in docker's config of the helper that is built in.
const ecrLogin = "ecr-login"

// isBuiltIn reports whether a helper is ours, and no program of its name is in
// PATH: who has put one there means it.
func isBuiltIn(suffix string) bool {
	if suffix != ecrLogin {
		return false
	}
	_, err := exec.LookPath("docker-credential-" + suffix)
	return err != nil
}

// askHelper asks a helper for what it has under a key; nil if that is nothing.
type askHelper func(ctx context.Context, suffix, key, where string) (*Credential, error)

// ask is the askHelper of all helpers, programs and the one built in.
func (k *Keychain) ask(ctx context.Context, suffix, key, where string) (*Credential, error) {
	if !isBuiltIn(suffix) {
		return helperGet(ctx, suffix, key, where)
	}
	if !ecr.IsRegistry(key) {
		return nil, nil
	}
	p, err := k.ecr.Password(ctx, key)
	var none *ecr.NoneError
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.As(err, &none) && ecr.Public(key):
		return nil, nil // anybody may pull
	default:
		return nil, diag.New(diag.ExitRegistry, "get a password for %q (%s, built in): %w", key, suffix, err).
			WithHint("The helper is named by %s. A program docker-credential-%s in PATH goes before the one built in.", where, suffix)
	}
	return &Credential{
		source: "Amazon ECR, with AWS credentials from " + p.Source,
		cfg:    authn.AuthConfig{Username: p.User},
		renew: func(ctx context.Context) (authn.AuthConfig, error) {
			p, err := k.ecr.Password(ctx, key)
			return authn.AuthConfig{Username: p.User, Password: p.Secret}, err
		},
	}, nil
}

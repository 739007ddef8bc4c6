package store

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"github.com/kiln-build/kiln/internal/diag"
)

// unusable is the error of Open for a directory that cannot be a store.
func unusable(root string, err error) error {
	var d *diag.Error
	if errors.As(err, &d) {
		return err
	}
	e := diag.New(diag.ExitFailure, "open store %q: %w", root, err)
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return e.WithHint("The store needs a directory that this user can write to: choose one with --root or KILN_ROOT.")
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return e.WithHint("Its disk is full.")
	case errors.Is(err, syscall.ENOLCK), errors.Is(err, syscall.EOPNOTSUPP):
		return e.WithHint("The file system does not support file locks (flock), without which a store is not safe: choose a directory on another one with --root.")
	}
	return e.WithHint("Choose another directory with --root or KILN_ROOT.")
}

// writing wraps an error of writing into the store.
func (s *Store) writing(what string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return diag.New(diag.ExitFailure, "write %s: the disk of the store %q is full: %w", what, s.root, err).
			WithHint("Make room (\"kiln prune\" removes what no tag needs), or choose a directory on a larger disk with --root or KILN_ROOT.")
	}
	return fmt.Errorf("write %s: %w", what, err)
}

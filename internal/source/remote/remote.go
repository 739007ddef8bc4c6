// Package remote has the sources that a build graph fetches while it runs, rather
// than a user beforehand: ADD of a URL or a git repository, named contexts
// that are one.
//
// What such a source is today decides what a build may take from its cache, so
// each is first resolved to a version, which costs little if nothing has changed
// since the last time, and fetched only if somebody needs its files.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/tree"
)

// Source is something remote: *HTTP or *Git.
type Source interface {
	// Resolve finds out what is there now. progress may be told of bytes; it may be nil.
	Resolve(ctx context.Context, env *Env, progress Progress) (Version, error)
	// String names the source without credentials.
	String() string
}

// Version is what a source was when it was resolved. It must be closed.
type Version interface {
	// Key tells versions apart whose files are not the same, among sources of all kinds.
	Key() []string
	// Open fetches the files, unless that was done already. They are good until the Version is closed.
	Open(ctx context.Context, progress Progress) (tree.Tree, error)
	// Metadata says what the version is. What ask asks for is fetched, if it takes that.
	Metadata(ctx context.Context, ask Ask) (Metadata, error)
	Close() error
}

// Ask is what is wanted of a version besides of what costs nothing.
type Ask struct {
	Objects bool // of a git repository: the commit and the tag
	// Algorithm is that of a checksum of a file of an http server, with Suffix after it; empty: none is wanted.
	Algorithm digest.Algorithm
	Suffix    []byte
}

// Metadata is what is known of a version; the field that is its source's is set.
type Metadata struct {
	HTTP *HTTPMetadata
	Git  *GitMetadata
}

// HTTPMetadata is what is known of a file of an http server.
type HTTPMetadata struct {
	Digest       digest.Digest
	Filename     string
	LastModified time.Time     // zero if the server did not say
	Checksum     digest.Digest // what was asked for
}

// GitMetadata is what is known of a commit.
type GitMetadata struct {
	git.Found
	Commit, Tag []byte // what was asked for; Tag is nil if there is none
}

// Progress is told how many bytes of how many (0: not known) have come.
type Progress func(current, total int64)

// Env is what fetching works with. The zero value fetches what needs neither
// credentials nor proxies, and remembers nothing.
type Env struct {
	Dir     string   // for files on their way
	Environ []string // as os.Environ has it: proxies, PATH for git
	// Secrets gives what a user passed for this build; nil: nothing.
	Secrets Secrets
	// SSH connects to the agents that a user passed for this build; nil: there are none.
	SSH SSH
	// Uploads answers requests for UploadHost in place of a server; nil: there is no such host.
	Uploads http.RoundTripper
	// Memory keeps what servers said the last time; nil: nothing is kept.
	Memory Memory
	// Pins has sources be the same for all who have it in their Env; nil: each is asked for anew. What was fetched
	// stays in Dir then.
	Pins   *Pins
	Limits layer.Limits
}

// UploadHost is the host of what a build's client sends itself, as a tar archive that is its context: no
// name that can be looked up.
const UploadHost = "buildkit-session"

// Secrets knows the values of secrets.
type Secrets interface {
	// Secret returns the value, or an error that is fs.ErrNotExist if there is none of that ID.
	Secret(ctx context.Context, id string) ([]byte, error)
}

// SSH knows ssh agents.
type SSH interface {
	// DialAgent connects to the agent of an ID ("default" if nobody named one), or returns
	// an error that is fs.ErrNotExist if there is none. Connections should have CloseWrite.
	DialAgent(ctx context.Context, id string) (net.Conn, error)
}

// Memory keeps records from build to build, as the store does.
type Memory interface {
	GetRecord(kind, key string) ([]byte, error)
	PutRecord(kind, key string, b []byte) error
}

// secret is the value of a secret, empty if there is none.
func (e *Env) secret(ctx context.Context, id string) (string, error) {
	if e.Secrets == nil || id == "" {
		return "", nil
	}
	b, err := e.Secrets.Secret(ctx, id)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("secret %q: %w", id, err)
	}
	return string(b), nil
}

// secrets is the first that there is of several.
func (e *Env) firstSecret(ctx context.Context, ids ...string) (id, value string, err error) {
	for _, id := range ids {
		if value, err = e.secret(ctx, id); err != nil || value != "" {
			return id, value, err
		}
	}
	return "", "", nil
}

// Package source opens what a build is made from: the build context that a
// command line names, and the Dockerfile.
//
// A context is a directory, standard input, a git repository or an http URL,
// told apart as Docker does. Whatever it is, it comes out as a tree.Tree,
// which reads lazily and knows the digests of its files' content.
package source

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/tree"
)

// Kind is what a context is.
type Kind string

// The kinds of contexts.
const (
	Local   Kind = "local"   // a directory
	Git     Kind = "git"     // a repository
	Archive Kind = "archive" // a tar, from standard input or an http server
	Bare    Kind = "bare"    // just a Dockerfile
)

// Context is an opened build context.
type Context struct {
	// Tree is the context, unfiltered. A directory and a repository are tree.Digesters.
	Tree tree.Tree
	Kind Kind
	// Ignore reports whether a .dockerignore in the context counts. As with
	// BuildKit it does in directories only: what an archive or a repository has,
	// somebody has chosen already.
	Ignore bool
	// DockerfileTree has the Dockerfile at the path DockerfileName, and at
	// "<DockerfileName>.dockerignore" the ignore file of its own, if it has one.
	// Neither is a symbolic link. It has nothing else.
	DockerfileTree tree.Tree
	DockerfileName string
	// Date is the context's time, for SOURCE_DATE_EPOCH=context: of a repository's commit, that the server said, or of an
	// archive's youngest file. Zero if it has none, as a directory.
	Date time.Time
	// Description says what the context is, without credentials.
	Description string
	// Close gives back what the context takes. It must be called once.
	Close func() error
}

// Options say what to open.
type Options struct {
	Arg        string    // PATH, URL or "-"
	Dockerfile string    // -f: a path, an http URL, "-", or "" for the usual place
	Stdin      io.Reader // what "-" stands for
	ScratchDir string    // where to put what is fetched
	StatCache  string    // directory of the stat cache; empty: none
	// Env is the environment, as os.Environ has it: proxies, PATH for git and
	// what git and ssh need.
	Env []string
	// GitToken, GitHeader and KnownHosts are git.Options' Token, Header and KnownHosts.
	GitToken, GitHeader, KnownHosts string
	// KeepGitDir is the build argument BUILDKIT_CONTEXT_KEEP_GIT_DIR.
	KeepGitDir bool
	// Limits bound what an archive may unpack to; a download, and the files of
	// a git commit, may have as many bytes.
	Limits layer.Limits
}

// MaxDockerfile is the size that a Dockerfile and its ignore file may have.
const MaxDockerfile = 16 << 20

// Open opens a context and finds the Dockerfile. An error that a user must act
// on is a *diag.Error.
func Open(ctx context.Context, o Options) (_ *Context, err error) {
	if o.Arg == "-" && o.Dockerfile == "-" {
		return nil, usage("the build context and the Dockerfile cannot both come from standard input").
			WithHint("Give a directory as the context, or a Dockerfile by its path.")
	}
	c, err := openContext(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.DockerfileTree != nil {
		return c, nil
	}
	if c.DockerfileTree, c.DockerfileName, err = openDockerfile(ctx, c, o); err != nil {
		return nil, err
	}
	return c, nil
}

package source

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/source/archive"
	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/source/http"
	"github.com/kiln-build/kiln/internal/source/inline"
	"github.com/kiln-build/kiln/internal/source/local"
	"github.com/kiln-build/kiln/internal/tree"
)

var httpURL = regexp.MustCompile(`^https?://`)

func usage(format string, a ...any) *diag.Error { return diag.New(diag.ExitUsage, format, a...) }

// openContext tells what kind of context there is, in Docker's order: what
// exists as a path is one, whatever it looks like.
func openContext(ctx context.Context, o Options) (*Context, error) {
	if o.Arg == "" {
		return nil, usage("there is no build context").WithHint("Give a directory, a URL, or - for standard input. The current directory is: .")
	}
	if o.Arg == "-" {
		return openStdin(ctx, o)
	}
	_, statErr := os.Stat(o.Arg)
	if statErr == nil {
		return openLocal(o)
	}
	ref, err := git.Parse(o.Arg)
	if err == nil {
		return openGit(ctx, ref, o)
	}
	if !errors.Is(err, git.ErrNotGit) {
		return nil, &diag.Error{Err: fmt.Errorf("open build context: %w", err), Code: diag.ExitUsage}
	}
	if httpURL.MatchString(o.Arg) {
		return openHTTP(ctx, o)
	}
	if errors.Is(statErr, fs.ErrPermission) {
		return nil, usage("open build context %q: %w", o.Arg, fs.ErrPermission)
	}
	return nil, usage("open build context: there is no directory %q, and it is no URL either", o.Arg).
		WithHint("URLs are https://HOST/….git#REF:DIRECTORY, git@HOST:PATH, https://HOST/FILE.tar.gz.")
}

func openLocal(o Options) (*Context, error) {
	var opts []local.Option
	if o.StatCache != "" {
		opts = append(opts, local.WithStatCache(o.StatCache))
	}
	l, err := local.Open(o.Arg, opts...)
	if err != nil {
		e := usage("open build context: %w", err)
		if fi, serr := os.Stat(o.Arg); serr == nil && fi.Mode().IsRegular() {
			return nil, e.WithHint("The context is a directory. Name a Dockerfile with -f: kiln build -f %q .", o.Arg)
		}
		return nil, e
	}
	return &Context{Tree: l, Kind: Local, Ignore: true, Description: o.Arg, Close: l.Close}, nil
}

func openGit(ctx context.Context, ref *git.Ref, o Options) (*Context, error) {
	t, err := git.Fetch(ctx, ref, git.Options{
		ScratchDir: o.ScratchDir, Env: o.Env, Token: o.GitToken, Header: o.GitHeader, KnownHosts: o.KnownHosts,
		KeepGitDir: o.KeepGitDir, MaxFiles: o.Limits.MaxEntries, MaxBytes: o.Limits.MaxBytes,
	})
	if err != nil {
		return nil, fmt.Errorf("open build context: %w", err)
	}
	return &Context{Tree: t, Kind: Git, Description: fmt.Sprintf("%s (commit %.12s)", ref, t.Commit), Date: t.Date, Close: t.Close}, nil
}

// openStdin takes standard input as an archive, or as the Dockerfile of an
// empty context.
func openStdin(ctx context.Context, o Options) (*Context, error) {
	br := bufio.NewReaderSize(stdin(o), 64<<10)
	head, err := br.Peek(archive.HeaderSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read build context from standard input: %w", err)
	}
	if len(head) == 0 {
		return nil, usage("read build context from standard input: there is nothing in it").
			WithHint("Pipe a tar or a Dockerfile into kiln, or give a directory: kiln build .")
	}
	if archive.Detect(head) {
		return openArchive(ctx, br, "tar from standard input", o)
	}
	if o.Dockerfile != "" {
		return nil, usage("standard input is no tar, so it must be the Dockerfile, but there is one by -f too").
			WithHint("For a Dockerfile from standard input with a directory as context: kiln build -f - DIRECTORY")
	}
	b, err := readBounded(br)
	if err != nil {
		return nil, fmt.Errorf("read Dockerfile from standard input: %w", err)
	}
	return &Context{
		Tree: inline.Tree{}, Kind: Bare, Description: "Dockerfile from standard input", Close: func() error { return nil },
		DockerfileTree: dockerfileTree("Dockerfile", b, nil), DockerfileName: "Dockerfile",
	}, nil
}

func stdin(o Options) io.Reader {
	if o.Stdin == nil {
		return eof{}
	}
	return o.Stdin
}

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }

func openArchive(ctx context.Context, r io.Reader, what string, o Options) (*Context, error) {
	t, err := archive.Read(ctx, r, o.ScratchDir, o.Limits)
	if err != nil {
		return nil, fmt.Errorf("open build context: %s: %w", what, err)
	}
	c := &Context{Tree: t, Kind: Archive, Description: what, Close: t.Close}
	if c.Date, err = youngest(ctx, t); err != nil {
		return nil, errors.Join(fmt.Errorf("open build context: %s: %w", what, err), t.Close())
	}
	return c, nil
}

// youngest is the time of the regular file that was changed last; zero if there is none.
func youngest(ctx context.Context, t tree.Tree) (when time.Time, err error) {
	err = tree.Walk(t, ".", func(_ string, n tree.Node) error {
		if n.IsRegular() && n.MTime.After(when) {
			when = n.MTime
		}
		return ctx.Err()
	})
	return when, err
}

// bareName is the name that a Dockerfile has in the context that it is itself.
const bareName = "context"

// openHTTP fetches an archive, or a file that is the Dockerfile and all that
// is in the context, with BuildKit's name for it.
func openHTTP(ctx context.Context, o Options) (*Context, error) {
	resp, err := http.Get(ctx, o.Arg, http.Options{Env: o.Env, MaxBytes: o.Limits.MaxBytes})
	if err != nil {
		return nil, fmt.Errorf("open build context: %w", err)
	}
	defer resp.Body.Close()
	what := http.Redact(o.Arg)
	br := bufio.NewReaderSize(resp.Body, 64<<10)
	head, err := br.Peek(archive.HeaderSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("open build context: fetch %s: %w", what, err)
	}
	if archive.Detect(head) {
		c, err := openArchive(ctx, br, what, o)
		if err == nil && !resp.LastModified.IsZero() {
			c.Date = resp.LastModified
		}
		return c, err
	}
	b, err := readBounded(br)
	if err != nil {
		return nil, fmt.Errorf("open build context: fetch Dockerfile %s: %w", what, err)
	}
	when := resp.LastModified
	if when.IsZero() {
		when = time.Unix(0, 0)
	}
	return &Context{
		Tree: inline.Tree{bareName: {Content: b, Mode: 0o600, MTime: when}}, Kind: Bare, Description: what, Date: resp.LastModified,
		Close:          func() error { return nil },
		DockerfileTree: dockerfileTree(bareName, b, nil), DockerfileName: bareName,
	}, nil
}

// readBounded reads a Dockerfile.
func readBounded(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxDockerfile+1))
	if err == nil && len(b) > MaxDockerfile {
		return nil, fmt.Errorf("it has more than %d bytes", MaxDockerfile)
	}
	return b, err
}

// Package git makes build contexts of git repositories, with the git program.
//
// Of a repository nothing is fetched but the one commit (as far as the server
// allows that), and nothing that comes with it is executed or heeded: no hooks,
// no configuration, no filters, no protocols but http, https, ssh and git, in
// submodules too. Git does not see the user's configuration either, and never
// asks questions.
//
// Credentials are given to git in its environment, scoped to the repository's
// host: they are on no command line, in no file, and in no error.
package git

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/source/local"
)

// Options say how to fetch.
type Options struct {
	// ScratchDir is where the repository goes; it needs no more than this.
	ScratchDir string
	// Env is the environment, as os.Environ has it. PATH, proxies, certificates,
	// SSH_AUTH_SOCK and GIT_SSH_COMMAND are taken from it, the rest is not seen by git.
	Env []string
	// Token authenticates to an http server as GitHub, GitLab and others want it.
	// Header is a whole Authorization header's value. Either replaces the user
	// and password in the URL.
	Token, Header string
	// KnownHosts is a file of ssh host keys. Without one, keys of unknown hosts
	// are believed, those that differ from the user's known hosts are not.
	KnownHosts string
	// KeepGitDir leaves a .git directory in the context, if that is the
	// repository's root.
	KeepGitDir bool
	// Found is what Resolve gave for the same ref; nil: the server is asked.
	Found *Found
	// StatCache is a directory for local.WithStatCache; empty: none.
	StatCache string
	// MaxFiles and MaxBytes bound what is checked out, submodules aside.
	// Default: a million and 128 GiB.
	MaxFiles int
	MaxBytes int64
}

const (
	defaultMaxFiles = 1 << 20
	defaultMaxBytes = 128 << 30
)

// Resolve asks the server what ref leads to now. The server is not asked what it need not say.
func Resolve(ctx context.Context, ref *Ref, o Options) (found Found, err error) {
	err = inScratch(ctx, ref, o, func(f *fetcher) error {
		found, err = f.resolve(ctx)
		return err
	})
	return found, err
}

// Objects are a commit, and the annotated tag that led to it (nil: none did), as git stores them.
type Objects struct {
	Commit, Tag         []byte
	CommitHash, TagHash string // TagHash is empty without a tag
}

// FetchObjects fetches what ref leads to, without checking it out.
func FetchObjects(ctx context.Context, ref *Ref, o Options) (objs Objects, err error) {
	err = inScratch(ctx, ref, o, func(f *fetcher) error {
		if err := f.get(ctx); err != nil {
			return err
		}
		objs, err = f.objects(ctx)
		return err
	})
	return objs, err
}

// inScratch has do done in a directory that is gone afterwards.
func inScratch(ctx context.Context, ref *Ref, o Options, do func(*fetcher) error) (err error) {
	dir, err := os.MkdirTemp(o.ScratchDir, "git-*")
	if err != nil {
		return fmt.Errorf("make directory for git: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	f := &fetcher{ref: ref, o: o, dir: dir, work: filepath.Join(dir, "tree")}
	if err := f.prepare(ctx); err != nil {
		return err
	}
	if err := do(f); err != nil {
		return withHint(fmt.Errorf("fetch %s: %w", ref, err))
	}
	return nil
}

// Fetch fetches a commit and checks it out. The tree keeps it on disk until it
// is closed.
func Fetch(ctx context.Context, ref *Ref, o Options) (_ *Tree, err error) {
	if o.MaxFiles <= 0 {
		o.MaxFiles = defaultMaxFiles
	}
	if o.MaxBytes <= 0 {
		o.MaxBytes = defaultMaxBytes
	}
	dir, err := os.MkdirTemp(o.ScratchDir, "git-*")
	if err != nil {
		return nil, fmt.Errorf("make directory for the git repository: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	f := &fetcher{ref: ref, o: o, dir: dir, work: filepath.Join(dir, "tree")}
	f.keep = (o.KeepGitDir || ref.KeepGitDir) && ref.Subdir == ""
	if err := f.prepare(ctx); err != nil {
		return nil, err
	}
	if err := f.fetch(ctx); err != nil {
		return nil, withHint(fmt.Errorf("fetch %s: %w", ref, err))
	}
	return f.tree()
}

// fetcher is one fetch.
type fetcher struct {
	ref  *Ref
	o    Options
	dir  string // everything is in here
	work string // the work tree
	keep bool   // the .git directory
	url  string // of the repository, without credentials
	git  *cli

	found  Found
	commit string
	time   time.Time
}

// prepare finds git and gives it an environment of its own.
func (f *fetcher) prepare(ctx context.Context) error {
	home := filepath.Join(f.dir, "home")
	for _, d := range []string{home, f.work} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return fmt.Errorf("make directory for the git repository: %w", err)
		}
	}
	var scope, header string
	f.url, scope, header = f.auth()
	var err error
	f.git, err = newCLI(ctx, f.o, home, f.work)
	if err != nil {
		return err
	}
	if header != "" {
		f.git.config("http."+scope+".extraHeader", "Authorization: "+header)
		_, secret, _ := strings.Cut(header, " ")
		f.git.secrets = append(f.git.secrets, header, secret, f.o.Token)
	}
	return nil
}

// auth splits what git is to know of a remote: its URL, and the header that
// authenticates to its host.
func (f *fetcher) auth() (remote, scope, header string) {
	u, err := url.Parse(f.ref.Remote)
	if !protocol.MatchString(f.ref.Remote) || err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return f.ref.Remote, "", ""
	}
	basic := func(user, password string) string {
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	}
	if u.User != nil {
		password, _ := u.User.Password()
		header = basic(u.User.Username(), password)
		u.User = nil
	}
	if f.o.Token != "" {
		header = basic("x-access-token", f.o.Token)
	}
	if f.o.Header != "" {
		header = f.o.Header
	}
	if strings.ContainsAny(header, "\r\n\x00") {
		header = "" // would be another header, or git's end
	}
	return u.String(), u.Scheme + "://" + u.Host + "/", header
}

// fetch brings the commit into the work tree.
func (f *fetcher) fetch(ctx context.Context) error {
	if err := f.get(ctx); err != nil {
		return err
	}
	if err := f.measure(ctx); err != nil {
		return err
	}
	if _, err := f.git.run(ctx, "checkout", "--quiet", "--detach", "--no-recurse-submodules", f.commit); err != nil {
		return fmt.Errorf("check out: %w", err)
	}
	if err := f.submodules(ctx); err != nil {
		return fmt.Errorf("fetch submodules: %w", err)
	}
	return f.tidy(ctx)
}

// get brings the commit into a repository of ours.
func (f *fetcher) get(ctx context.Context) (err error) {
	if f.o.Found != nil {
		f.found = *f.o.Found
	} else if f.found, err = f.resolve(ctx); err != nil {
		return err
	}
	if err := f.init(ctx); err != nil {
		return err
	}
	return f.fetchCommit(ctx)
}

func (f *fetcher) init(ctx context.Context) error {
	args := []string{"init", "--quiet"}
	if len(f.found.Hash) == 64 {
		args = append(args, "--object-format=sha256")
	}
	if _, err := f.git.run(ctx, args...); err != nil {
		return err
	}
	// Submodules with relative URLs are relative to it.
	_, err := f.git.run(ctx, "remote", "add", "origin", f.url)
	return err
}

// submodules fetches the repository's submodules, and theirs.
func (f *fetcher) submodules(ctx context.Context) error {
	if f.ref.SkipSubmodules {
		return nil
	}
	if _, err := os.Lstat(filepath.Join(f.work, ".gitmodules")); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	args := []string{"submodule", "--quiet", "update", "--init", "--recursive"}
	_, err := f.git.run(ctx, append(args, "--depth=1")...)
	if err != nil && ctx.Err() == nil && noShallow(err) {
		_, err = f.git.run(ctx, args...)
	}
	return err
}

// tidy removes what is not part of the context, and what would differ between
// two fetches of one commit.
func (f *fetcher) tidy(ctx context.Context) error {
	out, err := f.git.run(ctx, "show", "-s", "--format=%ct", f.commit)
	if err != nil {
		return err
	}
	sec, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		return fmt.Errorf("commit's time %q: %w", out, err)
	}
	const year9999 = 253402300799
	f.time = time.Unix(min(max(sec, 0), year9999), 0)
	gitDir := filepath.Join(f.work, ".git")
	if !f.keep {
		return os.RemoveAll(gitDir)
	}
	if f.found.Ref != "" {
		if _, err := f.git.run(ctx, "update-ref", f.found.Ref, f.found.Hash); err != nil {
			return err
		}
	}
	if _, err := f.git.run(ctx, "update-ref", "-d", wantedRef); err != nil {
		return err
	}
	if _, err := f.git.run(ctx, "remote", "set-url", "origin", Redact(f.ref.Remote)); err != nil {
		return err
	}
	for _, name := range []string{"FETCH_HEAD", "ORIG_HEAD", "logs"} {
		if err := os.RemoveAll(filepath.Join(gitDir, name)); err != nil {
			return err
		}
	}
	return nil
}

// tree opens the work tree.
func (f *fetcher) tree() (*Tree, error) {
	t := &Tree{dir: f.dir, Commit: f.commit, Date: f.time, keep: f.keep}
	if f.ref.MTime != "checkout" {
		t.time = f.time
	}
	if err := f.checkSubdir(); err != nil {
		return nil, err
	}
	var opts []local.Option
	if f.o.StatCache != "" {
		opts = append(opts, local.WithStatCache(f.o.StatCache))
	}
	var err error
	t.files, err = local.Open(filepath.Join(f.work, f.ref.Subdir), opts...)
	return t, err
}

// checkSubdir sees to it that the subdirectory consists of directories, and no
// links: the work tree is the repository's author's.
func (f *fetcher) checkSubdir() error {
	if f.ref.Subdir == "" {
		return nil
	}
	l, err := local.Open(f.work)
	if err != nil {
		return err
	}
	defer l.Close()
	n, err := l.Lstat(f.ref.Subdir)
	if errors.Is(err, os.ErrNotExist) || err == nil && inGitDir(f.ref.Subdir) {
		return fmt.Errorf("%s has no directory %q", Redact(f.ref.Remote), f.ref.Subdir)
	}
	if err == nil && !n.IsDir() {
		return fmt.Errorf("%q in %s is not a directory", f.ref.Subdir, Redact(f.ref.Remote))
	}
	return err
}

package remote

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/tree"
)

// Git is a commit of a git repository.
type Git struct {
	Ref git.Ref
	// TokenSecret and HeaderSecret are the IDs of the secrets that authenticate to an http server, a token or
	// an Authorization header; one that is called ID.HOST goes before. May be empty.
	TokenSecret, HeaderSecret string
	// Agent is the ID of the ssh agent that authenticates to an ssh server; empty: none.
	Agent string
	// KnownHosts are host keys for ssh, in the format of known_hosts; may be empty.
	KnownHosts string
}

func (g *Git) String() string { return g.Ref.String() }

// Resolve implements Source.
func (g *Git) Resolve(ctx context.Context, env *Env, _ Progress) (Version, error) {
	v := &gitVersion{g: g, env: env}
	if err := v.find(ctx); err != nil {
		return nil, v.closeAfter(err)
	}
	return v, nil
}

type gitVersion struct {
	g     *Git
	env   *Env
	found git.Found
	dir   string // for the files below
	opts  *git.Options
	agent *agentSocket
	tree  *git.Tree
}

// find asks the server, unless the commit is said already. A ref is the same whatever hash it should have.
func (v *gitVersion) find(ctx context.Context) (err error) {
	o, err := v.options(ctx)
	if err != nil {
		return err
	}
	ref, pins := v.g.Ref, v.env.Pins
	if ref.FetchByCommit {
		pins = nil
	} else {
		ref.Checksum = ""
	}
	v.found, err = pinned(ctx, pins, "git "+ref.Remote+"#"+ref.Rev, func() (git.Found, error) { return git.Resolve(ctx, &ref, o) })
	if err != nil {
		return err
	}
	if err := v.found.Check(v.g.Ref.Checksum); err != nil {
		return fmt.Errorf("fetch %s: %w", v.g, err)
	}
	return nil
}

// Key implements Version. The repository counts, since its submodules may be relative to it; the ref is only
// seen in a .git directory.
func (v *gitVersion) Key() []string {
	r := v.g.Ref
	key := []string{"git", v.found.Commit(), git.Redact(r.Remote), r.Subdir, r.MTime, strconv.FormatBool(r.SkipSubmodules)}
	if r.KeepGitDir {
		key = append(key, v.found.Hash, v.found.Ref)
	}
	return key
}

// Metadata implements Version.
func (v *gitVersion) Metadata(ctx context.Context, ask Ask) (Metadata, error) {
	md := &GitMetadata{Found: v.found}
	if !ask.Objects {
		return Metadata{Git: md}, nil
	}
	o, err := v.options(ctx)
	if err != nil {
		return Metadata{}, err
	}
	o.Found = &v.found
	objs, err := git.FetchObjects(ctx, &v.g.Ref, o)
	if err != nil {
		return Metadata{}, err
	}
	md.Commit, md.Tag, md.Peeled = objs.Commit, objs.Tag, ""
	if objs.TagHash != "" {
		md.Peeled = objs.CommitHash
	}
	return Metadata{Git: md}, nil
}

// Open implements Version.
func (v *gitVersion) Open(ctx context.Context, _ Progress) (tree.Tree, error) {
	if v.tree != nil {
		return v.tree, nil
	}
	o, err := v.options(ctx)
	if err != nil {
		return nil, err
	}
	o.Found = &v.found
	if v.tree, err = git.Fetch(ctx, &v.g.Ref, o); err != nil {
		return nil, err
	}
	return v.tree, nil
}

// Close implements Version.
func (v *gitVersion) Close() error { return v.closeAfter(nil) }

func (v *gitVersion) closeAfter(err error) error {
	if v.tree != nil {
		if cerr := v.tree.Close(); err == nil {
			err = cerr
		}
	}
	if v.agent != nil {
		v.agent.close()
	}
	if v.dir != "" {
		if rerr := os.RemoveAll(v.dir); err == nil {
			err = rerr
		}
	}
	return err
}

// options are how git is to fetch, credentials and all.
func (v *gitVersion) options(ctx context.Context) (_ git.Options, err error) {
	if v.opts != nil {
		return *v.opts, nil
	}
	if v.dir, err = os.MkdirTemp(v.env.Dir, "remote-*"); err != nil {
		return git.Options{}, err
	}
	o := git.Options{
		ScratchDir: v.dir, Env: v.environ(), MaxFiles: v.env.Limits.MaxEntries, MaxBytes: v.env.Limits.MaxBytes,
	}
	if o.Token, o.Header, err = v.credentials(ctx); err != nil {
		return o, err
	}
	if v.g.KnownHosts != "" {
		o.KnownHosts = filepath.Join(v.dir, "known_hosts")
		if err := os.WriteFile(o.KnownHosts, []byte(v.g.KnownHosts), 0o600); err != nil {
			return o, err
		}
	}
	if id := v.g.Agent; id != "" && v.env.SSH != nil {
		if v.agent, err = listenAgent(ctx, v.env.SSH, id, v.dir); err != nil {
			return o, fmt.Errorf("ssh agent %q: %w", id, err)
		}
		o.Env = append(o.Env, "SSH_AUTH_SOCK="+v.agent.path)
	}
	v.opts = &o
	return o, nil
}

// environ is the environment without the user's own ssh agent: a Dockerfile's
// author gets what the user passed to the build, and nothing else.
func (v *gitVersion) environ() []string {
	return slices.DeleteFunc(slices.Clone(v.env.Environ), func(kv string) bool {
		return strings.HasPrefix(kv, "SSH_AUTH_SOCK=") || strings.HasPrefix(kv, "GIT_SSH_COMMAND=")
	})
}

func (v *gitVersion) credentials(ctx context.Context) (token, header string, err error) {
	u, err := url.Parse(v.g.Ref.Remote)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return "", "", nil //nolint:nilerr // an ssh server's, perhaps in scp's style
	}
	ids := func(id string) []string {
		if id == "" {
			return nil
		}
		return []string{id + "." + u.Host, id}
	}
	if _, header, err = v.env.firstSecret(ctx, ids(v.g.HeaderSecret)...); err != nil || header != "" {
		return "", header, err
	}
	_, token, err = v.env.firstSecret(ctx, ids(v.g.TokenSecret)...)
	return token, "", err
}

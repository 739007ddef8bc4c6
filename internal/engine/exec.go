package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/sandbox"
	"github.com/kiln-build/kiln/internal/tree"
)

// defaultPath is a RUN step's PATH if the image says nothing, as BuildKit has it.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// session is a booted sandbox whose file system is the result of an operation.
type session struct {
	sandbox.Session
	config  sandbox.Config // without layers: what a step must agree with to go on in it
	cleanup func()
}

// exec runs a step, in the session of the step before it if there is one.
func (r *run) exec(ctx context.Context, s *state, x *Exec, ins []snapshot) ([]image.Layer, error) {
	var root snapshot
	if len(ins) > 0 {
		root = ins[0]
	}
	if root.context != nil {
		return nil, errors.New("a build context cannot be the root file system of a RUN step")
	}
	if p := x.Platform; p.OS != "linux" || p.Architecture != runtime.GOARCH {
		return nil, diag.New(diag.ExitStep, "a RUN step for %s/%s cannot run on this linux/%s machine", p.OS, p.Architecture, runtime.GOARCH).
			WithHint("build this platform on a machine of its kind, or do the work in a stage FROM --platform=$BUILDPLATFORM")
	}
	fsys, err := r.treeOf(ctx, root)
	if err != nil {
		return nil, err
	}
	p, err := process(fsys, x)
	if err != nil {
		return nil, err
	}
	if len(p.Args) == 0 {
		return nil, errors.New("a RUN step without a command")
	}
	mounts, err := r.mounts(ctx, s.op, x, ins)
	if err != nil {
		return nil, err
	}
	if err := r.slots.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	defer r.slots.Release(1)
	ses, err := r.startSession(ctx, s, x, root.layers, mounts)
	if err != nil {
		return nil, err
	}
	l, err := image.Commit(ctx, r.Store, image.CommitOptions{}, func(w io.Writer) error {
		return ses.Run(ctx, p, s.step, w)
	})
	if err != nil {
		r.closeSession(ses)
		return nil, explainExec(ctx, x, err)
	}
	r.keepSession(s, ses)
	l.Created = time.Now().UTC()
	return append(slices.Clip(root.layers), l), nil
}

func process(fsys tree.Tree, x *Exec) (sandbox.Process, error) {
	u, err := rootfs.LookupUser(fsys, x.User)
	if err != nil {
		return sandbox.Process{}, &diag.Error{Err: err, Code: diag.ExitDockerfile}
	}
	env := append(slices.Clone(x.Env), x.Proxy...)
	env = setDefault(env, "PATH", defaultPath)
	env = setDefault(env, "HOME", u.Home)
	return sandbox.Process{
		Args: x.Args, Env: env, Cwd: x.Cwd,
		User: sandbox.User{UID: u.UID, GID: u.GID, Groups: u.Groups},
	}, nil
}

func setDefault(env []string, k, v string) []string {
	if slices.ContainsFunc(env, func(kv string) bool { return strings.HasPrefix(kv, k+"=") }) {
		return env
	}
	return append(env, k+"="+v)
}

func (r *run) sessionConfig(x *Exec) sandbox.Config {
	host := x.Hostname
	if host == "" {
		host = sandbox.DefaultHostname
	}
	hosts := fmt.Sprintf("127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", host)
	for _, h := range x.Hosts {
		hosts += h.IP + "\t" + h.Name + "\n"
	}
	return sandbox.Config{
		Network: !x.NoNetwork, Hostname: host,
		Files: map[string][]byte{
			"/etc/hosts": []byte(hosts), "/etc/hostname": []byte(host + "\n"), "/etc/resolv.conf": r.ResolvConf,
		},
	}
}

func sameConfig(a, b sandbox.Config) bool {
	return a.Network == b.Network && a.Hostname == b.Hostname && string(a.Files["/etc/hosts"]) == string(b.Files["/etc/hosts"]) &&
		reflect.DeepEqual(a.Mounts, b.Mounts)
}

// startSession takes over the session of the step that made the root file
// system, or boots a new one.
func (r *run) startSession(ctx context.Context, s *state, x *Exec, layers []image.Layer, mounts []sandbox.Mount) (*session, error) {
	c := r.sessionConfig(x)
	c.Mounts = mounts
	if len(s.op.Inputs) > 0 {
		r.mu.Lock()
		old := r.sessions[s.op.Inputs[0].Op]
		delete(r.sessions, s.op.Inputs[0].Op)
		r.mu.Unlock()
		if old != nil && sameConfig(old.config, c) {
			return old, nil
		}
		if old != nil {
			r.closeSession(old)
		}
	}
	sb, err := r.sandboxOnce()
	if err != nil {
		return nil, err
	}
	dir, cleanup, err := r.Store.TempDir("run")
	if err != nil {
		return nil, err
	}
	ses := &session{config: c, cleanup: cleanup}
	c.Dir = dir
	for _, l := range layers {
		c.Layers = append(c.Layers, r.Store.LayerPath(l.DiffID))
	}
	if ses.Session, err = sb.Start(ctx, c); err != nil {
		cleanup()
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause // it is not the sandbox's fault
		}
		return nil, &diag.Error{Err: fmt.Errorf("start the %s sandbox: %w", sb.Name(), err), Code: diag.ExitSandbox, Hint: "`kiln info` says what this machine allows"}
	}
	return ses, nil
}

// keepSession keeps a session for a step that goes on from it, if there is any.
func (r *run) keepSession(s *state, ses *session) {
	for c := range s.consumers {
		if _, ok := c.Do.(*Exec); ok && c.Inputs[0].Op == s.op {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.sessions[s.op] = ses
			return
		}
	}
	r.closeSession(ses)
}

// closeSession ends a session while the build goes on; run.close waits for it.
func (r *run) closeSession(s *session) {
	r.background.Add(1)
	go func() {
		defer r.background.Done()
		s.Close()
		s.cleanup()
	}()
}

// explainExec words a failed step as BuildKit does, and adds what to do.
func explainExec(ctx context.Context, x *Exec, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	var e *sandbox.ExitError
	if !errors.As(err, &e) {
		return err
	}
	d := diag.New(diag.ExitStep, "process %q did not complete successfully: %w", strings.Join(x.Args, " "), e)
	switch {
	case e.DiskFull:
		d.Hint = "the disk that holds the store is full: `kiln prune` frees what no image uses, --root names another disk"
	case e.OutOfMemory:
		d.Hint = "the step was killed for memory: raise the memory limit of the pod or machine"
	case e.NotFound:
		d.Hint = fmt.Sprintf("is %q in the image, executable, and for its platform %s/%s?", x.Args[0], x.Platform.OS, x.Platform.Architecture)
	}
	return d
}

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
func (r *run) exec(ctx context.Context, s *state, x *Exec, ins []Result) ([]Result, error) {
	if p := x.Platform; p.OS != "linux" || p.Architecture != runtime.GOARCH {
		return nil, diag.New(diag.ExitStep, "a RUN step for %s/%s cannot run on this linux/%s machine", p.OS, p.Architecture, runtime.GOARCH).
			WithHint("build this platform on a machine of its kind, or do the work in a stage FROM --platform=$BUILDPLATFORM")
	}
	if len(x.Args) == 0 {
		return nil, errors.New("a RUN step without a command")
	}
	var root Result
	if len(ins) > 0 {
		var err error
		if root, err = r.inLayers(ctx, ins[0]); err != nil {
			return nil, err
		}
	}
	fsys, err := r.Tree(ctx, root)
	if err != nil {
		return nil, err
	}
	m, err := r.mounts(ctx, s.op, x, ins)
	if err != nil {
		return nil, err
	}
	defer m.release()
	secrets, err := r.secretEnv(ctx, x, m)
	if err != nil {
		return nil, err
	}
	p, err := process(fsys, x, secrets)
	if err != nil {
		return nil, err
	}
	// Last of all, so that nobody waits with a slot for somebody without.
	if err := r.slots.Acquire(ctx, 1); err != nil {
		return nil, context.Cause(ctx)
	}
	defer r.slots.Release(1)
	ses, err := r.startSession(ctx, s, x, root.Layers, m.mounts)
	if err != nil {
		return nil, err
	}
	outs, err := r.runIn(ctx, s, x, ses, p, m, root)
	if err != nil {
		r.closeSession(ses)
		return nil, explainExec(x, err)
	}
	r.keepSession(s, x, ses)
	return outs, nil
}

// runIn runs a process in a session and gives the step's results.
func (r *run) runIn(ctx context.Context, s *state, x *Exec, ses *session, p sandbox.Process, m *stepMounts, root Result) ([]Result, error) {
	output := newMask(s.step, m.secrets)
	run := func(changes io.Writer) error { return ses.Run(ctx, p, output, changes) }
	var l image.Layer
	var err error
	if x.isResult(Root) {
		l, err = image.Commit(ctx, r.Store, image.CommitOptions{}, run)
		l.Created = time.Now().UTC()
	} else {
		err = run(io.Discard)
	}
	output.Flush()
	var failed *sandbox.ExitError
	if err == nil || errors.As(err, &failed) { // what a failing step downloaded need not be downloaded again
		if kerr := r.keepCaches(ctx, ses, m); kerr != nil && err == nil {
			r.Progress.Warn(kerr.Error())
		}
	}
	if err != nil {
		return nil, err
	}
	outs := make([]Result, x.NumResults())
	for i := range outs {
		if outs[i], err = r.result(ctx, x, ses, m, x.result(i), append(slices.Clip(root.Layers), l)); err != nil {
			return nil, err
		}
	}
	return outs, nil
}

// result is what became of the root file system, or of a mount.
func (r *run) result(ctx context.Context, x *Exec, ses *session, m *stepMounts, n int, root []image.Layer) (Result, error) {
	if n == Root {
		return Result{Layers: root}, nil
	}
	below := m.below[n]
	if !x.Mounts[n].Writable {
		return Result{Layers: below}, nil
	}
	l, err := r.changes(ctx, ses, m.volumes[n])
	return Result{Layers: append(slices.Clip(below), l)}, err
}

func process(fsys tree.Tree, x *Exec, secrets []string) (sandbox.Process, error) {
	u, err := rootfs.LookupUser(fsys, x.User)
	if err != nil {
		return sandbox.Process{}, &diag.Error{Err: err, Code: diag.ExitDockerfile}
	}
	env := append(slices.Clone(x.Env), x.Proxy...)
	env = setDefault(env, "PATH", defaultPath)
	env = append(env, secrets...)
	env = setDefault(env, "HOME", u.Home)
	p := sandbox.Process{
		Args: x.Args, Env: env, Cwd: x.Cwd, Success: x.Success,
		User: sandbox.User{UID: u.UID, GID: u.GID, Groups: u.Groups},
	}
	for _, l := range x.Ulimits {
		p.Limits = append(p.Limits, sandbox.Limit(l))
	}
	return p, nil
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
		Network: !x.NoNetwork, Hostname: host, ReadOnlyRoot: x.ReadOnlyRoot,
		Files: map[string][]byte{
			"/etc/hosts": []byte(hosts), "/etc/hostname": []byte(host + "\n"), "/etc/resolv.conf": r.ResolvConf,
		},
	}
}

func sameConfig(a, b sandbox.Config) bool {
	return a.Network == b.Network && a.Hostname == b.Hostname && a.ReadOnlyRoot == b.ReadOnlyRoot && string(a.Files["/etc/hosts"]) == string(b.Files["/etc/hosts"]) &&
		reflect.DeepEqual(a.Mounts, b.Mounts)
}

// startSession takes over the session of the step that made the root file
// system, or boots a new one.
func (r *run) startSession(ctx context.Context, s *state, x *Exec, layers []image.Layer, mounts []sandbox.Mount) (*session, error) {
	c := r.sessionConfig(x)
	c.Mounts = mounts
	if len(s.op.Inputs) > 0 {
		r.sessionMu.Lock()
		old := r.sessions[s.op.Inputs[0].Op]
		delete(r.sessions, s.op.Inputs[0].Op)
		r.sessionMu.Unlock()
		if old != nil && sameConfig(old.config, c) {
			return old, nil
		}
		if old != nil {
			r.closeSession(old)
		}
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
	if ses.Session, err = r.Sandbox.Start(ctx, c); err != nil {
		cleanup()
		return nil, &diag.Error{Err: fmt.Errorf("start the %s sandbox: %w", r.Sandbox.Name(), err), Code: diag.ExitSandbox, Hint: "`kiln info` says what this machine allows"}
	}
	return ses, nil
}

// alone reports whether a step needs a session of its own: what it sees, or what comes
// back of it, is for nobody else.
func (x *Exec) alone() bool {
	return !x.isResult(Root) || x.NumResults() > 1 || slices.ContainsFunc(x.Mounts, func(m Mount) bool {
		return m.Cache != nil || m.Secret != nil || m.SSH != nil
	})
}

// keepSession keeps a session for a step that goes on from it, if there is any.
func (r *run) keepSession(s *state, x *Exec, ses *session) {
	for c := range s.consumers {
		if _, ok := c.Do.(*Exec); ok && c.Inputs[0].Op == s.op && !x.alone() {
			r.sessionMu.Lock()
			defer r.sessionMu.Unlock()
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
func explainExec(x *Exec, err error) error {
	var m *sandbox.MountError
	if errors.As(err, &m) {
		return &diag.Error{Err: m, Code: diag.ExitStep}
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

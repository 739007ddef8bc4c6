package sentry

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"path"
	"runtime"
	"slices"
	"strings"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/errors/linuxerr"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/limits"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/usermem"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// Exit statuses that a shell gives a command that it cannot start.
const (
	codeNotExecutable = 126
	codeNotFound      = 127
)

// run runs a process to its end, and makes its changes a lower layer. An error
// means that the sandbox failed, not the process.
func (g *guest) run(p wire.Process, conn *wire.Conn, changes io.Writer) (wire.Result, error) {
	g.releaseVolumes()
	fs, err := g.newRootfs()
	if err != nil {
		return wire.Result{}, err
	}
	defer g.release(fs)
	r, err := g.execute(fs, p, conn)
	if err != nil {
		return r, err
	}
	g.volumes, fs.volumes = fs.volumes, nil
	if r.Failed = r.NotFound || !succeeds(p, r.Code); r.Failed {
		r.DiskFull = g.anyFull(fs)
		return r, nil
	}
	if err := g.removeStubs(rootOf(fs.upper), fs.points); err != nil {
		return r, fmt.Errorf("remove mount points: %w", err)
	}
	// Nobody is left to write to it.
	if err := g.writeChanges(fs.upper, fs.below, changes); err != nil {
		return r, fmt.Errorf("write layer: %w", err)
	}
	// From here it is a layer like the others.
	if err := g.vfs.SetMountReadOnly(fs.upper, true); err != nil && !linuxerr.Equals(linuxerr.EBUSY, err) {
		return r, fmt.Errorf("freeze upper layer: %w", err)
	}
	return r, g.addLower(fs.upper)
}

func succeeds(p wire.Process, code int) bool {
	if len(p.Success) == 0 {
		return code == 0
	}
	return slices.Contains(p.Success, code)
}

// anyFull reports whether something that the step could write to the disk has no space left.
func (g *guest) anyFull(fs *rootfs) bool {
	full := g.isFull(fs.upper)
	for _, v := range g.volumes {
		full = full || v.upper != nil && g.isFull(v.upper)
	}
	return full
}

func (g *guest) execute(fs *rootfs, p wire.Process, conn *wire.Conn) (wire.Result, error) {
	ipc, err := g.newIPCNamespace()
	if err != nil {
		return wire.Result{}, fmt.Errorf("create ipc namespace: %w", err)
	}
	defer ipc.DecRef(g.ctx)
	pids := g.kernel.RootPIDNamespace().NewChild(g.ctx, g.kernel, g.kernel.RootUserNamespace())
	args := g.processArgs(pids, ipc)
	if err := limit(args.Limits, p.Limits); err != nil {
		return wire.Result{}, err
	}
	args.Argv, args.Envv, args.WorkingDirectory = wire.Strings(p.Args), wire.Strings(p.Env), "/"+strings.TrimLeft(string(p.Cwd), "/")
	args.Credentials = g.credentials(p)
	if args.MountNamespace, err = g.namespace(args.NewContext(g.kernel), fs); err != nil {
		return wire.Result{}, err
	}
	root := args.MountNamespace.Root(g.ctx)
	defer root.DecRef(g.ctx)
	if err := g.makeCwd(root, args.WorkingDirectory); err != nil {
		return wire.Result{Code: codeNotExecutable, NotFound: true, Detail: fmt.Sprintf("cannot make working directory %q: %v", args.WorkingDirectory, err)}, nil
	}
	if g.config.ReadOnlyRoot {
		if err := g.vfs.SetMountReadOnly(root.Mount(), true); err != nil {
			return wire.Result{}, fmt.Errorf("make root read-only: %w", err)
		}
	}
	if r, ok := g.findExecutable(root, &args); !ok {
		return r, nil
	}
	relays := g.startRelays(fs.listeners, conn)
	defer relays.stop(g)
	return g.start(root, &args, wire.Pieces{Conn: conn, Type: wire.TypeOutput})
}

// start starts a process and waits for the end of it and all that it started.
func (g *guest) start(root vfs.VirtualDentry, args *kernel.CreateProcessArgs, output io.Writer) (_ wire.Result, err error) {
	var out *pump
	if args.FDTable, out, err = g.newStdio(args, output); err != nil {
		return wire.Result{}, fmt.Errorf("create stdio: %w", err)
	}
	tg, _, err := g.kernel.CreateProcess(*args)
	args.FDTable.DecRef(g.ctx)
	if err != nil {
		if err := out.finish(g.ctx); err != nil {
			return wire.Result{}, err
		}
		return g.execFailure(root, args, err), nil
	}
	g.kernel.StartProcess(tg)
	tg.WaitExited()
	// The end of a PID namespace's first process kills the others, but gVisor
	// does not wait for them: without this the upper layer might still change.
	for _, t := range args.PIDNamespace.Tasks() {
		t.ThreadGroup().WaitExited()
	}
	if err := out.finish(g.ctx); err != nil {
		return wire.Result{}, fmt.Errorf("read output: %w", err)
	}
	return resultOf(tg.ExitStatus()), nil
}

// limit replaces limits of resources.
func limit(set *limits.LimitSet, ls []wire.Limit) error {
	for _, l := range ls {
		t, ok := limits.FromLinuxResource[l.Resource]
		if !ok {
			return fmt.Errorf("there is no resource %d to limit", l.Resource)
		}
		set.SetUnchecked(t, limits.Limit{Cur: limits.FromLinux(l.Soft), Max: limits.FromLinux(l.Hard)})
	}
	return nil
}

func resultOf(ws linux.WaitStatus) wire.Result {
	if ws.Exited() {
		return wire.Result{Code: int(ws.ExitStatus())}
	}
	sig := int(ws.TerminationSignal())
	return wire.Result{Code: 128 + sig, Signal: sig}
}

func (g *guest) processArgs(pids *kernel.PIDNamespace, ipc *kernel.IPCNamespace) kernel.CreateProcessArgs {
	ls := limits.NewLimitSet()
	if l, err := limits.NewLinuxDistroLimitSet(); err == nil {
		ls = l
	}
	const docker = 1 << 20
	ls.SetUnchecked(limits.NumberOfFiles, limits.Limit{Cur: docker, Max: docker})
	return kernel.CreateProcessArgs{
		Umask: 0o022, Limits: ls, MaxSymlinkTraversals: linux.MaxSymlinkTraversals,
		UTSNamespace: g.kernel.RootUTSNamespace(), IPCNamespace: ipc, PIDNamespace: pids, ContainerID: "kiln",
	}
}

// credentials are docker's: root has its default set of capabilities, anybody
// else has it as the bound of what a set-user-ID program may get.
func (g *guest) credentials(p wire.Process) *auth.Credentials {
	caps := &auth.TaskCapabilities{BoundingCaps: dockerCapabilities()}
	if p.UID == 0 {
		caps.PermittedCaps, caps.EffectiveCaps = dockerCapabilities(), dockerCapabilities()
	}
	groups := make([]auth.KGID, len(p.Groups))
	for i, n := range p.Groups {
		groups[i] = auth.KGID(n)
	}
	return auth.NewUserCredentials(auth.KUID(p.UID), auth.KGID(p.GID), groups, caps, g.kernel.RootUserNamespace())
}

// makeCwd makes what is missing of the working directory, root's as BuildKit
// does. The path is not cleaned: /a/b/.. makes b as well, and leads elsewhere
// than /a if b is a link.
func (g *guest) makeCwd(root vfs.VirtualDentry, cwd string) error {
	made := ""
	for name := range strings.SplitSeq(cwd, "/") {
		if name == "" {
			continue
		}
		made += "/" + name
		_, err := g.stat(follow(root, made))
		if isMissing(err) {
			err = g.vfs.MkdirAt(g.ctx, g.root, at(root, made), &vfs.MkdirOptions{Mode: 0o755})
		}
		if err != nil {
			return err
		}
	}
	st, err := g.stat(follow(root, cwd))
	if err == nil && !isType(st, linux.S_IFDIR) {
		err = linuxerr.ENOTDIR
	}
	return err
}

// findExecutable sets args.Filename to what Argv[0] means, or says what is
// wrong in the words of runc, which BuildKit's users know.
func (g *guest) findExecutable(root vfs.VirtualDentry, args *kernel.CreateProcessArgs) (wire.Result, bool) {
	if len(args.Argv) == 0 || args.Argv[0] == "" {
		return wire.Result{Code: codeNotFound, NotFound: true, Detail: "no command given"}, false
	}
	name := args.Argv[0]
	if strings.Contains(name, "/") {
		full := name
		if !path.IsAbs(name) {
			full = args.WorkingDirectory + "/" + name
		}
		if err := g.canExecute(root, args.Credentials, full); err != nil {
			return notFound(err, fmt.Sprintf("exec: %q: stat %s: %v", name, name, err)), false
		}
		args.Filename = full
		return wire.Result{}, true
	}
	failure := wire.Result{Code: codeNotFound, NotFound: true, Detail: fmt.Sprintf("exec: %q: executable file not found in $PATH", name)}
	for _, e := range args.Envv {
		list, ok := strings.CutPrefix(e, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range strings.Split(list, ":") {
			full := dir + "/" + name
			if !path.IsAbs(dir) {
				full = args.WorkingDirectory + "/" + full
			}
			err := g.canExecute(root, args.Credentials, full)
			if err == nil {
				args.Filename = full
				return wire.Result{}, true
			}
			if linuxerr.Equals(linuxerr.EACCES, err) {
				failure = notFound(err, fmt.Sprintf("exec: %q: %v", full, err))
			}
		}
		break // the first PATH counts
	}
	return failure, false
}

func notFound(err error, detail string) wire.Result {
	r := wire.Result{Code: codeNotExecutable, NotFound: true, Detail: detail}
	if isMissing(err) || linuxerr.Equals(linuxerr.ENOTDIR, err) {
		r.Code = codeNotFound
	}
	return r
}

func (g *guest) canExecute(root vfs.VirtualDentry, creds *auth.Credentials, name string) error {
	st, err := g.vfs.StatAt(g.ctx, creds, follow(root, name), &vfs.StatOptions{Mask: linux.STATX_TYPE})
	if err != nil {
		return err
	}
	if !isType(st, linux.S_IFREG) {
		return linuxerr.EACCES
	}
	return g.vfs.AccessAt(g.ctx, creds, vfs.MayExec, follow(root, name))
}

// execFailure explains why the kernel refused to load an executable. Its error
// has a text alone, which ends in the cause's.
func (g *guest) execFailure(root vfs.VirtualDentry, args *kernel.CreateProcessArgs, err error) wire.Result {
	r := wire.Result{Code: codeNotExecutable, NotFound: true, Detail: fmt.Sprintf("exec %s: %v", args.Argv[0], err)}
	switch text := err.Error(); {
	case strings.HasSuffix(text, linuxerr.ENOEXEC.Error()):
		r.Detail = fmt.Sprintf("exec %s: exec format error", args.Argv[0])
		if m := g.foreignMachine(root, args.Filename); m != "" {
			r.Detail += fmt.Sprintf(" (it is a program for %s, and this sandbox runs %s)", m, runtime.GOARCH)
		}
	case strings.HasSuffix(text, linuxerr.ENOENT.Error()):
		r.Code = codeNotFound
		r.Detail = fmt.Sprintf("exec %s: no such file or directory (its interpreter or dynamic loader is not in the image)", args.Argv[0])
	case strings.HasSuffix(text, linuxerr.EACCES.Error()):
		r.Detail = fmt.Sprintf("exec %s: permission denied", args.Argv[0])
	}
	return r
}

// foreignMachine names the architecture of an ELF executable that is not of this one's.
func (g *guest) foreignMachine(root vfs.VirtualDentry, name string) string {
	fd, err := g.vfs.OpenAt(g.ctx, g.root, follow(root, name), &vfs.OpenOptions{Flags: linux.O_RDONLY})
	if err != nil {
		return ""
	}
	defer fd.DecRef(g.ctx)
	var head [20]byte
	n, err := fd.PRead(g.ctx, usermem.BytesIOSequence(head[:]), 0, vfs.ReadOptions{})
	if n < int64(len(head)) || (err != nil && err != io.EOF) || !bytes.HasPrefix(head[:], []byte(elf.ELFMAG)) {
		return ""
	}
	var order binary.ByteOrder = binary.LittleEndian
	if head[elf.EI_DATA] == byte(elf.ELFDATA2MSB) {
		order = binary.BigEndian
	}
	m := elf.Machine(order.Uint16(head[18:]))
	if (m == elf.EM_X86_64 && runtime.GOARCH == "amd64") || (m == elf.EM_AARCH64 && runtime.GOARCH == "arm64") {
		return ""
	}
	switch m {
	case elf.EM_X86_64:
		return "amd64"
	case elf.EM_AARCH64:
		return "arm64"
	}
	return strings.ToLower(strings.TrimPrefix(m.String(), "EM_"))
}

// openNull opens the guest's null device.
func (g *guest) openNull(root vfs.VirtualDentry) (*vfs.FileDescription, error) {
	return g.vfs.OpenAt(g.ctx, g.root, follow(root, "/dev/null"), &vfs.OpenOptions{Flags: linux.O_RDONLY})
}

// isFull reports whether the upper layer has practically no space left.
func (g *guest) isFull(upper *vfs.Mount) bool {
	st, err := g.vfs.StatFSAt(g.ctx, g.root, at(rootOf(upper), ""))
	if err != nil {
		return false
	}
	const little = 1 << 20
	free := st.BlocksAvailable * uint64(st.BlockSize)
	return free < little || st.BlocksAvailable < st.Blocks/200
}

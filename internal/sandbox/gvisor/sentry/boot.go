package sentry

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/abi/linux"
	"gvisor.dev/gvisor/pkg/context"
	"gvisor.dev/gvisor/pkg/cpuid"
	"gvisor.dev/gvisor/pkg/gomaxprocs"
	"gvisor.dev/gvisor/pkg/rand"
	"gvisor.dev/gvisor/pkg/ring0"
	"gvisor.dev/gvisor/pkg/sentry/devices/memdev"
	"gvisor.dev/gvisor/pkg/sentry/devices/ttydev"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/cgroup2fs"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/dev"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/devpts"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/erofs"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/host"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/mqfs"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/overlay"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/proc"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/sys"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/kernel"
	"gvisor.dev/gvisor/pkg/sentry/kernel/auth"
	"gvisor.dev/gvisor/pkg/sentry/loader"
	"gvisor.dev/gvisor/pkg/sentry/pgalloc"
	"gvisor.dev/gvisor/pkg/sentry/platform"
	"gvisor.dev/gvisor/pkg/sentry/seccheck"
	"gvisor.dev/gvisor/pkg/sentry/time"
	"gvisor.dev/gvisor/pkg/sentry/usage"
	"gvisor.dev/gvisor/pkg/sentry/vfs"
	"gvisor.dev/gvisor/pkg/sighandling"

	// What the guest's system calls reach through registration.
	_ "gvisor.dev/gvisor/pkg/sentry/socket/netlink"
	_ "gvisor.dev/gvisor/pkg/sentry/socket/netlink/route"
	_ "gvisor.dev/gvisor/pkg/sentry/socket/unix"
	_ "gvisor.dev/gvisor/pkg/sentry/syscalls/linux"

	// Only these two: KVM needs /dev/kvm, which no pod has.
	_ "gvisor.dev/gvisor/pkg/sentry/platform/ptrace"
	_ "gvisor.dev/gvisor/pkg/sentry/platform/systrap"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// guest is a booted kernel and the layers that its processes see.
type guest struct {
	config *wire.Config
	kernel *kernel.Kernel
	vfs    *vfs.VirtualFilesystem
	ctx    context.Context   // the supervisor's, lives as long as the process
	root   *auth.Credentials // all-powerful, for our own doings
	upper  *pgalloc.MemoryFile
	lowers []*vfs.Mount // topmost first
	empty  []*vfs.Mount // below every stack of layers: an overlay wants two lowers
	layers []*vfs.Mount // of all layer files, by number
	// implied are inodes of directories that a layer has no entry for, by number of the layer.
	implied []map[uint64]bool
	stacks  []*vfs.Mount // the volumes' layers, merged
	// volumes are as the last step left them.
	volumes []volume
	relay   atomic.Pointer[wire.Relay] // the running step's; nil between steps
}

// platformError is a failure to boot that another platform might not have.
type platformError struct{ err error }

func (e *platformError) Error() string { return e.err.Error() }
func (e *platformError) Unwrap() error { return e.err }

// boot brings the guest kernel up. The order follows runsc's boot.New; what
// depends on it is in docs/design/sandbox.md.
func boot(c *wire.Config) (*guest, error) {
	p, err := newPlatform(c.Platform)
	if err != nil {
		return nil, &platformError{err}
	}
	volunteer()
	f := buildFilter(p, c.Network) // in the background, it takes as long as all the rest
	g := &guest{config: c, kernel: &kernel.Kernel{Platform: p, AllowSUID: true}}
	if err := g.initKernel(); err != nil {
		return nil, err
	}
	if err := g.registerFilesystems(); err != nil {
		return nil, err
	}
	if err := sighandling.IgnoreChildStop(); err != nil {
		return nil, err
	}
	if err := g.mountLayers(); err != nil {
		return nil, err
	}
	if err := f.install(); err != nil {
		return nil, &platformError{err}
	}
	if err := g.kernel.Start(); err != nil { // no task yet: it starts the clocks
		return nil, fmt.Errorf("start kernel: %w", err)
	}
	if _, err := g.createExitProcess(g.kernel.RootPIDNamespace()); err != nil {
		return nil, fmt.Errorf("create phantom init: %w", err)
	}
	if c.SelfTest {
		if err := g.selfTest(); err != nil {
			return nil, &platformError{fmt.Errorf("self-test: %w", err)}
		}
	}
	return g, nil
}

func newPlatform(name string) (platform.Platform, error) {
	cpuid.Initialize()
	ring0.InitDefault()
	seccheck.Initialize()
	if err := errors.Join(rand.Init(), usage.Init()); err != nil {
		return nil, err
	}
	// Also ends Go's periodic update of GOMAXPROCS, whose sched_getaffinity
	// the seccomp filter answers with SIGSYS, a second or a minute after the boot.
	gomaxprocs.SetBase(runtime.NumCPU())
	ctor, err := platform.Lookup(name)
	if err != nil {
		return nil, err
	}
	p, err := ctor.New(platform.Options{ApplicationCores: runtime.NumCPU()})
	if err != nil {
		return nil, fmt.Errorf("start platform %s: %w", name, err)
	}
	return p, nil
}

func (g *guest) initKernel() error {
	k := g.kernel
	memory, upper, err := memoryFiles()
	if err != nil {
		return fmt.Errorf("create memory files: %w", err)
	}
	g.upper = upper
	k.SetMemoryFile(memory)
	vdso, err := loader.PrepareVDSO(memory)
	if err != nil {
		return fmt.Errorf("prepare vdso: %w", err)
	}
	clocks := kernel.NewTimekeeper()
	params := kernel.NewVDSOParamPage(memory, vdso.ParamPage.FileRange())
	clocks.SetClocks(time.NewCalibratedClocks(false), params)
	users := auth.NewRootUserNamespace()
	g.root = auth.NewRootCredentials(users)
	network, err := newNetwork(g.config.Network, clocks, k, users)
	if err != nil {
		return fmt.Errorf("create network: %w", err)
	}
	setTotalMemory()
	if err := k.Init(kernel.InitKernelArgs{
		FeatureSet:           cpuid.HostFeatureSet().Fixed(),
		Timekeeper:           clocks,
		RootUserNamespace:    users,
		RootNetworkNamespace: network,
		ApplicationCores:     uint(runtime.NumCPU()),
		Vdso:                 vdso,
		VdsoParams:           params,
		RootUTSNamespace:     kernel.NewUTSNamespace(g.config.Hostname, "", users),
		RootIPCNamespace:     kernel.NewIPCNamespace(users),
		RootPIDNamespace:     kernel.NewRootPIDNamespace(users),
		MaxFDLimit:           kernel.MaxFdLimit,
		Cgroup2FSInit:        cgroup2fs.NewFilesystem, // k.Init wants it, mounted or not
	}); err != nil {
		return fmt.Errorf("init kernel: %w", err)
	}
	g.vfs, g.ctx = k.VFS(), k.SupervisorContext()
	return nil
}

func (g *guest) registerFilesystems() error {
	user := &vfs.RegisterFilesystemTypeOptions{AllowUserMount: true, AllowUserList: true}
	for name, t := range map[string]vfs.FilesystemType{
		devpts.Name: &devpts.FilesystemType{}, dev.Name: &dev.FilesystemType{}, erofs.Name: &erofs.FilesystemType{},
		mqfs.Name: &mqfs.FilesystemType{}, overlay.Name: &overlay.FilesystemType{}, proc.Name: &proc.FilesystemType{},
		sys.Name: &sys.FilesystemType{}, tmpfs.Name: &tmpfs.FilesystemType{}, cgroup2fs.Name: &cgroup2fs.FilesystemType{},
	} {
		g.vfs.MustRegisterFilesystemType(name, t, user)
	}
	// Before the first mount of "dev", which makes a node for each device known.
	if err := errors.Join(memdev.Register(g.vfs), ttydev.Register(g.vfs)); err != nil {
		return fmt.Errorf("register devices: %w", err)
	}
	hostfs, err := host.NewFilesystem(g.vfs) // hostinet's sockets live on it
	if err != nil {
		return fmt.Errorf("create host file system: %w", err)
	}
	g.kernel.SetHostMount(g.vfs.NewDisconnectedMount(hostfs, nil, &vfs.MountOptions{}))
	return nil
}

// createExitProcess creates a process that would exit with 0, in a file
// system of its own.
//
// The first one stays unstarted for ever, as process 1 of the root PID
// namespace. Each step then has a PID namespace of its own, so that its first
// process is pid 1 and takes the rest with it, while Kernel.GlobalInit, whose
// mount namespace gVisor's contexts use without asking, lives on: with the
// first step as the global init the second one would panic.
func (g *guest) createExitProcess(pids *kernel.PIDNamespace) (*kernel.ThreadGroup, error) {
	mns, err := g.vfs.NewMountNamespace(g.ctx, g.root, "none", tmpfs.Name, &vfs.MountOptions{}, g.kernel)
	if err != nil {
		return nil, err
	}
	root := mns.Root(g.ctx)
	defer root.DecRef(g.ctx)
	if err := g.writeFile(at(root, "/init"), exitProgram(runtime.GOARCH), 0o755); err != nil {
		return nil, err
	}
	args := g.processArgs(pids, g.kernel.RootIPCNamespace())
	args.Argv, args.Filename, args.MountNamespace, args.Credentials = []string{"/init"}, "/init", mns, g.root
	args.FDTable = g.kernel.NewFDTable()
	defer args.FDTable.DecRef(g.ctx)
	tg, _, err := g.kernel.CreateProcess(args)
	return tg, err
}

// selfTest runs a process: whether the platform can is not known before.
func (g *guest) selfTest() error {
	pids := g.kernel.RootPIDNamespace().NewChild(g.ctx, g.kernel, g.kernel.RootUserNamespace())
	tg, err := g.createExitProcess(pids)
	if err != nil {
		return err
	}
	g.kernel.StartProcess(tg)
	tg.WaitExited()
	if ws := tg.ExitStatus(); !ws.Exited() || ws.ExitStatus() != 0 {
		return fmt.Errorf("a program that exits with 0 ended with wait status %#x", uint32(ws))
	}
	return nil
}

// dockerCapabilities is what docker and BuildKit give a container's root.
func dockerCapabilities() auth.CapabilitySet {
	return auth.CapabilitySetOfMany([]linux.Capability{
		linux.CAP_CHOWN, linux.CAP_DAC_OVERRIDE, linux.CAP_FSETID, linux.CAP_FOWNER, linux.CAP_MKNOD,
		linux.CAP_NET_RAW, linux.CAP_SETGID, linux.CAP_SETUID, linux.CAP_SETFCAP, linux.CAP_SETPCAP,
		linux.CAP_NET_BIND_SERVICE, linux.CAP_SYS_CHROOT, linux.CAP_KILL, linux.CAP_AUDIT_WRITE,
	})
}

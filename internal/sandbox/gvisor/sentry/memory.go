package sentry

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/memutil"
	"gvisor.dev/gvisor/pkg/sentry/fsimpl/tmpfs"
	"gvisor.dev/gvisor/pkg/sentry/pgalloc"
	"gvisor.dev/gvisor/pkg/sentry/usage"

	"github.com/kiln-build/kiln/internal/sandbox/gvisor/wire"
)

// gcPercent trades the sentry's CPU for its memory: inodes of the upper layer
// live in the Go heap, about 1.5 KB each, and Go's default would let the heap
// grow to twice that before it collects.
const gcPercent = 40

// volunteer has the kernel choose this process should memory run out: its loss
// fails a step, the builder's all. Raising one's own score is always allowed.
// Stubs inherit the score of the first one: called after the platform made
// that, they are not chosen, for gVisor would wait for ever for one that is gone.
func volunteer() {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
}

// memoryFiles makes the files that the guest's memory and the upper layer's
// data live in. Application memory is in memfd, i.e. counted and swapped as
// memory is; the upper's is on disk, so that a step may write more than fits in memory.
func memoryFiles() (memory, upper *pgalloc.MemoryFile, err error) {
	fd, err := memutil.CreateMemFD("memory", 0)
	if err != nil {
		return nil, nil, err
	}
	memory, err = pgalloc.NewMemoryFile(os.NewFile(uintptr(fd), "memory"), pgalloc.MemoryFileOpts{})
	if err != nil {
		return nil, nil, err
	}
	upper, err = pgalloc.NewMemoryFile(os.NewFile(wire.FDUpper, "upper"), pgalloc.MemoryFileOpts{
		// Guest writes become pwrite(2): a full disk is then an error to the
		// guest and not a SIGBUS to us.
		DiskBackedFile: true, DisableMemoryAccounting: true,
	})
	return memory, upper, err
}

// upperSize is how many bytes an upper layer may take: all that is free on
// its disk now, but for a margin. The guest then sees a file system that is full, as on
// any machine, instead of writes to a mapped file that fail behind its back.
func upperSize() uint64 {
	const least = 1 << 20
	var st unix.Statfs_t
	if err := unix.Fstatfs(wire.FDUpper, &st); err != nil || st.Bsize <= 0 {
		return least
	}
	free := st.Bavail * uint64(st.Bsize)
	return max(free-min(free, max(16<<20, free/50)), least)
}

// setTotalMemory fixes what the guest sees as the machine's memory.
func setTotalMemory() {
	mem := totalMemory()
	tmpfs.SetTotalHostMem(mem)
	usage.MinimumTotalMemoryBytes, usage.MaximumTotalMemoryBytes = mem, mem
}

// totalMemory is the smaller of the host's memory and the control group's limit.
func totalMemory() uint64 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 2 << 30
	}
	mem := uint64(si.Totalram) * uint64(si.Unit)
	for _, f := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil && n > 0 && n < mem {
			mem = n
		}
	}
	return mem
}

package sandboxtest

import (
	"bytes"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// guestName is what a guest calls the test binary by.
const guestName = "guesttool"

// GuestMain makes a test binary do, inside of a guest, what busybox cannot. A
// TestMain calls it first; it returns true if the process was such a call.
func GuestMain(args []string) (code int, handled bool) {
	if len(args) < 2 || filepath.Base(args[0]) != guestName {
		return 0, false
	}
	if err := guestCommand(args[1], args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", guestName, strings.Join(args[1:], " "), err)
		return 1, true
	}
	return 0, true
}

// guestTool is the test binary, if it can run where there are no libraries.
func guestTool(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Skip("the test binary is linked dynamically and cannot run in the guest: use CGO_ENABLED=0")
		}
	}
	return b
}

func guestCommand(name string, a []string) error {
	for len(a) < 3 {
		a = append(a, "")
	}
	do, ok := map[string]func(a []string) error{
		"setxattr": guestSetxattr, "getxattr": guestGetxattr, "settime": guestSetTime, "sparse": guestSparse,
		"talk": guestTalk, "hold": guestHold,
		"write": guestWrite, "files": guestFiles, "eat": guestEat, "dial": guestDial,
		"mmap":     func(a []string) error { return guestMmap(a[0]) },
		"deep":     func(a []string) error { return guestDeep(a[0], a[1]) },
		"unlinked": func(a []string) error { return guestUnlinked(a[0]) },
		"socket":   func(a []string) error { return guestSocket(a[0]) },
		"fds":      func([]string) error { return guestFDs() },
		"leakpipe": func([]string) error { return guestLeakPipe() },
		"limits":   func([]string) error { return guestLimits() },
		"nonewprivs": func([]string) error {
			n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
			fmt.Println(n)
			return err
		},
	}[name]
	if !ok {
		return errors.New("unknown command")
	}
	return do(a)
}

// guestSetxattr takes PATH NAME HEX.
func guestSetxattr(a []string) error {
	v, err := hex.DecodeString(a[2])
	if err != nil {
		return err
	}
	return unix.Lsetxattr(a[0], a[1], v, 0)
}

// guestGetxattr takes PATH NAME.
func guestGetxattr(a []string) error {
	b := make([]byte, 4096)
	n, err := unix.Lgetxattr(a[0], a[1], b)
	fmt.Println(hex.EncodeToString(b[:max(n, 0)]))
	return err
}

// guestSetTime takes PATH SECONDS NANOSECONDS.
func guestSetTime(a []string) error {
	sec, err := strconv.ParseInt(a[1], 10, 64)
	if err != nil {
		return err
	}
	nsec, err := strconv.ParseInt(a[2], 10, 64)
	if err != nil {
		return err
	}
	ts := unix.Timespec{Sec: sec, Nsec: nsec}
	return unix.UtimesNanoAt(unix.AT_FDCWD, a[0], []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
}

// guestWrite takes SIZE, and writes so much in one system call.
func guestWrite(a []string) error {
	n, err := strconv.Atoi(a[0])
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(bytes.Repeat([]byte("\x00\x01\xff\xfe\r\n\x1b["), n/8))
	return err
}

// guestSocket takes PATH.
func guestSocket(path string) error {
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	return l.Close()
}

// guestDial takes ADDRESS.
func guestDial(a []string) error {
	c, err := net.DialTimeout("tcp", a[0], 5*time.Second)
	if err != nil {
		return err
	}
	_, err = c.Write([]byte("hello from the guest"))
	c.Close()
	return err
}

func guestLimits() error {
	for _, r := range []int{unix.RLIMIT_NOFILE, unix.RLIMIT_CORE, unix.RLIMIT_STACK} {
		var l unix.Rlimit
		if err := unix.Getrlimit(r, &l); err != nil {
			return err
		}
		fmt.Println(l.Cur, l.Max)
	}
	return nil
}

// guestEat takes MEGABYTES, and uses so much memory.
func guestEat(a []string) error {
	n, err := strconv.Atoi(a[0])
	if err != nil {
		return err
	}
	b := make([]byte, n<<20)
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	time.Sleep(200 * time.Millisecond)
	fmt.Println("ate", len(b))
	return nil
}

// guestFiles takes DIR COUNT BYTES.
func guestFiles(a []string) error {
	n, err := strconv.Atoi(a[1])
	if err != nil {
		return err
	}
	size, err := strconv.Atoi(a[2])
	if err != nil {
		return err
	}
	for i := range n {
		d := fmt.Sprintf("%s/%d", a[0], i/1000)
		if i%1000 == 0 {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(fmt.Sprintf("%s/%d", d, i), make([]byte, size), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func guestMmap(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	const size = 1 << 20
	if err := f.Truncate(size); err != nil {
		return err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for i := range b {
		b[i] = byte('a' + i%26)
	}
	return nil // neither msync nor munmap
}

// guestSparse takes PATH SIZE.
func guestSparse(a []string) error {
	size, err := strconv.ParseInt(a[1], 10, 64)
	if err != nil {
		return err
	}
	f, err := os.Create(a[0])
	if err != nil {
		return err
	}
	if _, err := f.WriteAt([]byte("end"), size-3); err != nil {
		return err
	}
	return f.Close()
}

func guestDeep(dir, depth string) error {
	n, err := strconv.Atoi(depth)
	if err != nil {
		return err
	}
	if err := os.Chdir(dir); err != nil {
		return err
	}
	for range n {
		if err := os.Mkdir("directory", 0o755); err != nil {
			return err
		}
		if err := os.Chdir("directory"); err != nil {
			return err
		}
	}
	return os.WriteFile("bottom", []byte("deep"), 0o644)
}

// guestFDs prints the descriptors that the process was given.
func guestFDs() error {
	for fd := range 1024 {
		var st unix.Stat_t
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 { // Go's own have it
			continue
		}
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
		fmt.Printf("%d %o\n", fd, st.Mode&unix.S_IFMT)
	}
	return nil
}

// guestLeakPipe leaves stdout's writing end in a socket's queue, where it
// survives its process.
func guestLeakPipe() error {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	// Each end in the other's queue, so that closing them frees neither.
	for i := range p {
		if err := unix.Sendmsg(p[i], []byte("x"), unix.UnixRights(p[0], p[1], 1), nil, 0); err != nil {
			return err
		}
	}
	fmt.Println("leaked")
	return nil
}

func guestUnlinked(dir string) error {
	f, err := os.Create(dir + "/unlinked")
	if err != nil {
		return err
	}
	if err := os.Remove(f.Name()); err != nil {
		return err
	}
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		return err
	}
	if _, err := f.Seek(0, 0); err != nil {
		return err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	fmt.Println(st.Size, st.Nlink)
	return nil
}

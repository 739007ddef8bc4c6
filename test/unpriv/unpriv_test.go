package unpriv

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be the program that is run without privilege.
func TestMain(m *testing.M) {
	switch os.Getenv("UNPRIV_TEST") {
	case "exec":
		o := Options{UID: 65532, GID: 65532, Env: []string{"UNPRIV_TEST=check"}}
		fmt.Println(Exec(o, append([]string{"/proc/self/exe"}, os.Args[1:]...)))
		os.Exit(125)
	case "check":
		if len(os.Args) > 1 && os.Args[1] == "-help" {
			os.Exit(0)
		}
		if err := Check(os.Args[1]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("holds")
		os.Exit(0)
	case "deadly":
		o := Options{UID: 65532, GID: 65532, Deadly: true, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}
		fmt.Println(Exec(o, append([]string{"sh", "-c"}, os.Args[1:]...)))
		os.Exit(125)
	case "etc":
		o := Options{UID: 65532, GID: 65532, Etc: os.Args[1], Env: []string{"PATH=/usr/bin:/bin"}}
		fmt.Println(Exec(o, append([]string{"sh", "-c"}, os.Args[2:]...)))
		os.Exit(125)
	case "readonly":
		o := Options{UID: 65532, GID: 65532, ReadOnly: true, Writable: []string{os.Args[1]}, Env: []string{"PATH=/usr/bin:/bin"}}
		fmt.Println(Exec(o, append([]string{"sh", "-c"}, os.Args[2:]...)))
		os.Exit(125)
	}
	os.Exit(m.Run())
}

func self(t *testing.T, mode string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = []string{"UNPRIV_TEST=" + mode}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// scratch is a directory that uid 65532 can reach and write.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "unpriv-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if os.Geteuid() == 0 {
		if err := os.Chown(dir, 65532, 65532); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestExecGivesUpEverything(t *testing.T) {
	out, err := self(t, "exec", scratch(t))
	if err != nil || out != "holds\n" {
		t.Fatalf("%v\n%s", err, out)
	}
}

func TestCheckNoticesPrivilege(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: shows that Check fails with privilege")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", exe, scratch(t)) // Check does mount and chroot if it can
	cmd.Env = []string{"UNPRIV_TEST=check", "HOME=/root", "PATH=" + os.Getenv("PATH")}
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatal("Check found nothing wrong with root")
	}
	for _, want := range []string{"uid is 0", "HOME is", "NoNewPrivs is", "Seccomp is", "CapEff is", "chroot works", "mount works", "unshare(NEWNS) works"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
}

func TestReadOnlyView(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	rw, ro := scratch(t), scratch(t)
	out, err := self(t, "readonly", rw, "touch "+rw+"/a && echo yes; touch "+ro+"/a || echo no")
	if err != nil || !strings.Contains(out, "yes") || !strings.Contains(out, "no\n") {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(ro, "a")); err == nil {
		t.Fatal("a file was written in the read-only view")
	}
}

func TestEtc(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := scratch(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "unpriv-test"), []byte("over\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := self(t, "etc", dir, "cat /etc/unpriv-test; test -s /etc/passwd && echo under")
	if err != nil || out != "over\nunder\n" {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, err := os.Stat("/etc/unpriv-test"); err == nil {
		t.Error("the machine's own /etc was changed")
	}
}

func TestDeadly(t *testing.T) {
	for script, want := range map[string]bool{"id -u; true": true, "unshare -U true": false, "chroot / true": false, "(true); echo $(echo x)": true} {
		out, err := self(t, "deadly", "("+script+") || exit $?")
		if (err == nil) != want {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
		if !want && !strings.Contains(err.Error(), "159") { // 128 + SIGSYS
			t.Errorf("%s: %v, not killed by SIGSYS\n%s", script, err, out)
		}
	}
}

// verdict runs a filter as the kernel would, on golang.org/x/net/bpf's machine.
// That machine loads words as big endian, so the data is written that way.
func verdict(t *testing.T, code []unix.SockFilter, arch, nr uint32, args ...uint64) uint32 {
	t.Helper()
	raw := make([]bpf.RawInstruction, len(code))
	for i, c := range code {
		raw[i] = bpf.RawInstruction{Op: c.Code, Jt: c.Jt, Jf: c.Jf, K: c.K}
	}
	prog, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("filter has an unknown instruction")
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], nr)
	binary.BigEndian.PutUint32(data[4:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	v, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(v)
}

func native() uint32 {
	if runtime.GOARCH == "arm64" {
		return unix.AUDIT_ARCH_AARCH64
	}
	return unix.AUDIT_ARCH_X86_64
}

func TestProfile(t *testing.T) {
	const (
		allow = uint32(unix.SECCOMP_RET_ALLOW)
		deny  = uint32(unix.SECCOMP_RET_ERRNO | unix.EPERM)
	)
	cases := []struct {
		name string
		caps []string
		nr   uint32
		args []uint64
		want uint32
	}{
		{"read", nil, unix.SYS_READ, nil, allow},
		{"mount", nil, unix.SYS_MOUNT, nil, deny},
		{"mount with its capability", []string{"CAP_SYS_ADMIN"}, unix.SYS_MOUNT, nil, allow},
		{"unknown number", nil, 9999, nil, deny},
		{"clone of a thread", nil, unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_THREAD}, allow},
		{"clone with a user namespace", nil, unix.SYS_CLONE, []uint64{unix.CLONE_NEWUSER | 17}, deny},
		{"clone with a high bit", nil, unix.SYS_CLONE, []uint64{1<<40 | 17}, allow},
		{"clone3", nil, unix.SYS_CLONE3, nil, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
		{"clone3 with its capability", []string{"CAP_SYS_ADMIN"}, unix.SYS_CLONE3, nil, allow},
		{"personality 0", nil, unix.SYS_PERSONALITY, []uint64{0}, allow},
		{"personality query", nil, unix.SYS_PERSONALITY, []uint64{0xffffffff}, allow},
		{"personality no randomize", nil, unix.SYS_PERSONALITY, []uint64{0x40000}, deny},
		{"socket inet", nil, unix.SYS_SOCKET, []uint64{unix.AF_INET}, allow},
		{"socket alg", nil, unix.SYS_SOCKET, []uint64{unix.AF_ALG}, deny},
		{"socket 39", nil, unix.SYS_SOCKET, []uint64{39}, allow},
		{"socket vsock", nil, unix.SYS_SOCKET, []uint64{unix.AF_VSOCK}, deny},
		{"socket xdp", nil, unix.SYS_SOCKET, []uint64{unix.AF_XDP}, allow},
		{"ptrace", nil, unix.SYS_PTRACE, nil, allow},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			f, err := Filter(c.caps)
			if err != nil {
				t.Fatal(err)
			}
			if got := verdict(t, f, native(), c.nr, c.args...); got != c.want {
				t.Errorf("%#x, want %#x", got, c.want)
			}
		})
	}
	f, err := Filter(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := verdict(t, f, unix.AUDIT_ARCH_I386, unix.SYS_READ); got != deny {
		t.Errorf("another architecture: %#x, want %#x", got, deny)
	}
}

func TestMinKernel(t *testing.T) {
	for _, c := range []struct {
		kernel [2]int
		want   uint32
	}{{[2]int{4, 7}, unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)}, {[2]int{4, 8}, unix.SECCOMP_RET_ALLOW}, {[2]int{10, 0}, unix.SECCOMP_RET_ALLOW}} {
		f, err := compile(profileJSON, conditions{arch: runtime.GOARCH, kernel: c.kernel})
		if err != nil {
			t.Fatal(err)
		}
		if got := verdict(t, f, native(), unix.SYS_PTRACE); got != c.want {
			t.Errorf("ptrace on %v: %#x, want %#x", c.kernel, got, c.want)
		}
	}
}

func TestComparisons(t *testing.T) {
	const v = 5<<32 | 7
	values := []uint64{0, 7, 6, 8, 5 << 32, v - 1, v, v + 1, 4<<32 | 9, 6<<32 | 1, 1<<64 - 1}
	holds := map[string]func(x uint64) bool{
		"SCMP_CMP_EQ":        func(x uint64) bool { return x == v },
		"SCMP_CMP_NE":        func(x uint64) bool { return x != v },
		"SCMP_CMP_LT":        func(x uint64) bool { return x < v },
		"SCMP_CMP_LE":        func(x uint64) bool { return x <= v },
		"SCMP_CMP_GT":        func(x uint64) bool { return x > v },
		"SCMP_CMP_GE":        func(x uint64) bool { return x >= v },
		"SCMP_CMP_MASKED_EQ": func(x uint64) bool { return x&v == 4<<32|1 },
	}
	for op, f := range holds {
		a := newAsm(1)
		args := []argCmp{{Index: 2, Value: v, ValueTwo: 4<<32 | 1, Op: op}}
		if err := a.rule(3, args, 2); err != nil {
			t.Fatal(err)
		}
		if err := a.rule(4, nil, 3); err != nil { // still reached, with the number loaded again
			t.Fatal(err)
		}
		code, err := a.done()
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range append(values, 4<<32|1, 12<<32|9) {
			want := uint32(1)
			if f(x) {
				want = 2
			}
			if got := verdict(t, code, native(), 3, 0, 0, x); got != want {
				t.Errorf("%s of %#x: %d, want %d", op, x, got, want)
			}
		}
		if got := verdict(t, code, native(), 4); got != 3 {
			t.Errorf("%s: the next rule gives %d", op, got)
		}
	}
}

package unpriv

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// profileJSON is docker's default seccomp profile.
//
//go:embed seccomp.json
var profileJSON []byte

type profile struct {
	DefaultAction   string    `json:"defaultAction"`
	DefaultErrnoRet *uint32   `json:"defaultErrnoRet"`
	Syscalls        []sysRule `json:"syscalls"`
}

type sysRule struct {
	Names    []string `json:"names"`
	Action   string   `json:"action"`
	ErrnoRet *uint32  `json:"errnoRet"`
	Args     []argCmp `json:"args"`
	Includes applies  `json:"includes"`
	Excludes applies  `json:"excludes"`
}

type argCmp struct {
	Index    uint32 `json:"index"`
	Value    uint64 `json:"value"`
	ValueTwo uint64 `json:"valueTwo"`
	Op       string `json:"op"`
}

type applies struct {
	Caps      []string `json:"caps"`
	Arches    []string `json:"arches"`
	MinKernel string   `json:"minKernel"`
}

// conditions is what a container runtime knows when it loads a profile.
type conditions struct {
	caps   []string
	arch   string
	kernel [2]int
}

// loaded says whether a rule is part of the filter: as in moby, each kind of
// include must hold, and no exclude may.
func (r *sysRule) loaded(c conditions) (bool, error) {
	if len(r.Excludes.Arches) > 0 && slices.Contains(r.Excludes.Arches, c.arch) {
		return false, nil
	}
	for _, k := range r.Excludes.Caps {
		if slices.Contains(c.caps, k) {
			return false, nil
		}
	}
	if len(r.Includes.Arches) > 0 && !slices.Contains(r.Includes.Arches, c.arch) {
		return false, nil
	}
	for _, k := range r.Includes.Caps {
		if !slices.Contains(c.caps, k) {
			return false, nil
		}
	}
	for _, v := range []struct {
		min  string
		want bool
	}{{r.Excludes.MinKernel, false}, {r.Includes.MinKernel, true}} {
		if v.min == "" {
			continue
		}
		m, err := parseKernel(v.min)
		if err != nil {
			return false, err
		}
		if (slices.Compare(c.kernel[:], m[:]) >= 0) != v.want {
			return false, nil
		}
	}
	return true, nil
}

func parseKernel(s string) ([2]int, error) {
	f := strings.FieldsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if len(f) < 2 {
		return [2]int{}, fmt.Errorf("parse kernel version %q", s)
	}
	a, err := strconv.Atoi(f[0])
	if err != nil {
		return [2]int{}, fmt.Errorf("parse kernel version %q: %w", s, err)
	}
	b, err := strconv.Atoi(f[1])
	if err != nil {
		return [2]int{}, fmt.Errorf("parse kernel version %q: %w", s, err)
	}
	return [2]int{a, b}, nil
}

func hostKernel() ([2]int, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return [2]int{}, fmt.Errorf("read kernel version: %w", err)
	}
	return parseKernel(unix.ByteSliceToString(u.Release[:]))
}

// Filter is docker's default profile as a BPF program for this machine, for a
// process that holds caps ("CAP_SYS_ADMIN", …). Only the native system call
// table is allowed: 32-bit programs get EPERM, which docker would let run.
func Filter(caps []string) ([]unix.SockFilter, error) {
	k, err := hostKernel()
	if err != nil {
		return nil, err
	}
	return compile(profileJSON, conditions{caps: caps, arch: runtime.GOARCH, kernel: k})
}

// deadlyFilter kills whoever calls what only a privileged builder needs.
func deadlyFilter() ([]unix.SockFilter, error) {
	numbers, err := syscallNumbers()
	if err != nil {
		return nil, err
	}
	a := newAsm(unix.SECCOMP_RET_ALLOW)
	for _, n := range []string{"unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "fsopen", "fsmount", "move_mount", "open_tree", "mount_setattr"} {
		if err := a.rule(numbers[n], nil, unix.SECCOMP_RET_KILL_PROCESS); err != nil {
			return nil, err
		}
	}
	const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET
	none := argCmp{Value: namespaces, Op: "SCMP_CMP_MASKED_EQ"}
	if err := a.rule(numbers["clone"], []argCmp{none}, unix.SECCOMP_RET_ALLOW); err != nil {
		return nil, err
	}
	if err := a.rule(numbers["clone"], nil, unix.SECCOMP_RET_KILL_PROCESS); err != nil {
		return nil, err
	}
	return a.done()
}

func compile(data []byte, c conditions) ([]unix.SockFilter, error) {
	var p profile
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("read seccomp profile: %w", err)
	}
	numbers, err := syscallNumbers()
	if err != nil {
		return nil, err
	}
	def, err := action(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, err
	}
	a := newAsm(def)
	for i := range p.Syscalls {
		r := &p.Syscalls[i]
		ok, err := r.loaded(c)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		act, err := action(r.Action, r.ErrnoRet)
		if err != nil {
			return nil, err
		}
		for _, n := range r.Names {
			nr, ok := numbers[n]
			if !ok {
				continue // of another architecture, or newer than the table
			}
			if err := a.rule(nr, r.Args, act); err != nil {
				return nil, fmt.Errorf("compile seccomp rule of %s: %w", n, err)
			}
		}
	}
	return a.done()
}

func syscallNumbers() (map[string]uint32, error) {
	m := make(map[string]uint32)
	for line := range strings.Lines(syscalls) {
		f := strings.Fields(line)
		n, err := strconv.ParseUint(f[1], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("read system call table: %w", err)
		}
		m[f[0]] = uint32(n)
	}
	return m, nil
}

func action(name string, errno *uint32) (uint32, error) {
	switch name {
	case "SCMP_ACT_ALLOW":
		return unix.SECCOMP_RET_ALLOW, nil
	case "SCMP_ACT_ERRNO":
		e := uint32(unix.EPERM)
		if errno != nil {
			e = *errno
		}
		return unix.SECCOMP_RET_ERRNO | e&unix.SECCOMP_RET_DATA, nil
	}
	return 0, fmt.Errorf("seccomp action %q is not known", name)
}

// asm writes a linear program: one block a rule, ending in its action, skipped
// when the rule does not match.
type asm struct {
	code    []unix.SockFilter
	def     uint32
	clobber bool // the accumulator no longer holds the system call's number
}

// Offsets in struct seccomp_data.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

const (
	ldAbs = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
	and   = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
	jeq   = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
	jgt   = unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K
	jge   = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
	ret   = unix.BPF_RET | unix.BPF_K
)

func newAsm(def uint32) *asm {
	arch := uint32(unix.AUDIT_ARCH_X86_64)
	if runtime.GOARCH == "arm64" {
		arch = unix.AUDIT_ARCH_AARCH64
	}
	return &asm{def: def, code: []unix.SockFilter{
		{Code: ldAbs, K: offArch},
		{Code: jeq, K: arch, Jt: 1},
		{Code: ret, K: def},
		{Code: ldAbs, K: offNr},
	}}
}

// Places a jump may go to, until the block's length is known.
const (
	next = iota // the following instruction
	pass        // the end of this argument's comparison: it holds
	fail        // the end of the rule: it does not match
)

type jump struct {
	op    uint16
	k     uint32
	jt    int
	jf    int
	plain bool // not a jump
}

func (a *asm) rule(nr uint32, args []argCmp, act uint32) error {
	var block []unix.SockFilter
	fails := map[int][2]bool{} // which jumps of which instruction go to the rule's end
	add := func(seq []jump) {
		start := len(block)
		for i, j := range seq {
			f := unix.SockFilter{Code: j.op, K: j.k}
			if !j.plain {
				to := func(where int) uint8 {
					if where == pass {
						return uint8(len(seq) - i - 1)
					}
					return 0
				}
				f.Jt, f.Jf = to(j.jt), to(j.jf)
				fails[start+i] = [2]bool{j.jt == fail, j.jf == fail}
			}
			block = append(block, f)
		}
	}
	if a.clobber {
		a.code = append(a.code, unix.SockFilter{Code: ldAbs, K: offNr})
		a.clobber = false
	}
	add([]jump{{op: jeq, k: nr, jt: next, jf: fail}})
	for _, c := range args {
		seq, err := compare(c)
		if err != nil {
			return err
		}
		add(seq)
		a.clobber = true
	}
	block = append(block, unix.SockFilter{Code: ret, K: act})
	if len(block) > 200 {
		return fmt.Errorf("%d comparisons are too many", len(args))
	}
	for i, f := range fails {
		if f[0] {
			block[i].Jt = uint8(len(block) - i - 1)
		}
		if f[1] {
			block[i].Jf = uint8(len(block) - i - 1)
		}
	}
	a.code = append(a.code, block...)
	return nil
}

// compare is the test of one 64-bit argument, high word first.
func compare(c argCmp) ([]jump, error) {
	if c.Index > 5 {
		return nil, fmt.Errorf("argument %d does not exist", c.Index)
	}
	lo := jump{op: ldAbs, k: offArgs + 8*c.Index, plain: true}
	hi := jump{op: ldAbs, k: offArgs + 8*c.Index + 4, plain: true}
	vh, vl := uint32(c.Value>>32), uint32(c.Value)
	switch c.Op {
	case "SCMP_CMP_EQ":
		return []jump{hi, {op: jeq, k: vh, jf: fail}, lo, {op: jeq, k: vl, jf: fail}}, nil
	case "SCMP_CMP_NE":
		return []jump{hi, {op: jeq, k: vh, jf: pass}, lo, {op: jeq, k: vl, jt: fail}}, nil
	case "SCMP_CMP_MASKED_EQ":
		return []jump{
			hi,
			{op: and, k: vh, plain: true},
			{op: jeq, k: uint32(c.ValueTwo >> 32), jf: fail},
			lo,
			{op: and, k: vl, plain: true},
			{op: jeq, k: uint32(c.ValueTwo), jf: fail},
		}, nil
	case "SCMP_CMP_GT":
		return []jump{hi, {op: jgt, k: vh, jt: pass}, {op: jeq, k: vh, jf: fail}, lo, {op: jgt, k: vl, jf: fail}}, nil
	case "SCMP_CMP_GE":
		return []jump{hi, {op: jgt, k: vh, jt: pass}, {op: jeq, k: vh, jf: fail}, lo, {op: jge, k: vl, jf: fail}}, nil
	case "SCMP_CMP_LT":
		return []jump{hi, {op: jgt, k: vh, jt: fail}, {op: jeq, k: vh, jf: pass}, lo, {op: jge, k: vl, jt: fail}}, nil
	case "SCMP_CMP_LE":
		return []jump{hi, {op: jgt, k: vh, jt: fail}, {op: jeq, k: vh, jf: pass}, lo, {op: jgt, k: vl, jt: fail}}, nil
	}
	return nil, fmt.Errorf("comparison %q is not known", c.Op)
}

func (a *asm) done() ([]unix.SockFilter, error) {
	a.code = append(a.code, unix.SockFilter{Code: ret, K: a.def})
	if len(a.code) > unix.BPF_MAXINSNS {
		return nil, fmt.Errorf("compile seccomp profile: %d instructions are more than the kernel takes", len(a.code))
	}
	return a.code, nil
}

package engine

import (
	"fmt"
	"io"
	"strings"
)

// Print writes the graph for people: a numbered operation a line, with what it
// takes as input and where in the Dockerfile it stands.
func (g *Graph) Print(w io.Writer) {
	number := map[*Op]int{}
	for i, op := range g.Ops {
		number[op] = i + 1
		var from []string
		for _, in := range op.Inputs {
			if in.Op == nil {
				from = append(from, "scratch")
				continue
			}
			from = append(from, in.describe(number))
		}
		fmt.Fprintf(w, "#%-3d %s", i+1, op.Name)
		if len(from) > 0 {
			fmt.Fprintf(w, "  ← %s", strings.Join(from, ", "))
		}
		if op.At != nil {
			fmt.Fprintf(w, "  (%s:%d)", op.At.File, op.At.Line)
		}
		fmt.Fprintln(w)
		for _, l := range details(op, number) {
			fmt.Fprintf(w, "       %s\n", l)
		}
	}
	switch g.Target.Op {
	case nil:
		fmt.Fprintln(w, "result: an empty file system")
	default:
		fmt.Fprintf(w, "result: %s\n", g.Target.describe(number))
	}
}

// describe names an input: "#3" is operation 3's result, "#3.2" its second.
func (in Input) describe(number map[*Op]int) string {
	if in.Index == 0 {
		return fmt.Sprintf("#%d", number[in.Op])
	}
	return fmt.Sprintf("#%d.%d", number[in.Op], in.Index+1)
}

func details(op *Op, number map[*Op]int) (ls []string) {
	switch do := op.Do.(type) {
	case *Image:
		ls = append(ls, "image "+do.Ref)
	case *Layout:
		ls = append(ls, fmt.Sprintf("image %s of an OCI layout", do.Digest))
	case *Local:
		ls = append(ls, fmt.Sprintf("build context %q", do.Name))
		if len(do.Exclude) > 0 {
			ls = append(ls, fmt.Sprintf("without %q", do.Exclude))
		}
	case *Remote:
		ls = append(ls, fmt.Sprintf("fetch %s", do.Source))
	case *Exec:
		ls = append(ls, fmt.Sprintf("exec %q in %q as %q", do.Args, do.Cwd, do.User))
		if do.NoNetwork {
			ls = append(ls, "without network")
		}
		if do.ReadOnlyRoot {
			ls = append(ls, "which cannot write to its root")
		}
		for _, e := range do.SecretEnv {
			ls = append(ls, fmt.Sprintf("with secret %q in $%s", e.ID, e.Name))
		}
		for i, m := range do.Mounts {
			l := "with " + m.describe(op, number)
			if do.isResult(i) {
				l += ", a result"
			}
			ls = append(ls, l)
		}
	case *File:
		for _, a := range do.Actions {
			ls = append(ls, describe(&a))
		}
	}
	return ls
}

func describe(a *Action) string {
	switch {
	case a.Copy != nil:
		return fmt.Sprintf("copy %q to %q", a.Copy.Src, a.Copy.Dest)
	case a.Mkfile != nil:
		return fmt.Sprintf("write %q (%d bytes)", a.Mkfile.Path, len(a.Mkfile.Data))
	case a.Mkdir != nil:
		return fmt.Sprintf("make directory %q", a.Mkdir.Path)
	case a.Remove != nil:
		return fmt.Sprintf("remove %q", a.Remove.Path)
	case a.Link != nil:
		return fmt.Sprintf("link %q to %q", a.Link.Newpath, a.Link.Oldpath)
	}
	return "nothing"
}

func (m *Mount) describe(op *Op, number map[*Op]int) string {
	what := "nothing"
	switch {
	case m.Tmpfs != nil && m.Tmpfs.Size > 0:
		what = fmt.Sprintf("an empty directory of %d bytes", m.Tmpfs.Size)
	case m.Tmpfs != nil:
		what = "an empty directory"
	case m.Secret != nil:
		return fmt.Sprintf("secret %q at %q", m.Secret.ID, m.Dest)
	case m.SSH != nil:
		return fmt.Sprintf("SSH agent %q at %q", m.SSH.ID, m.Dest)
	case op.Inputs[m.Input].Op != nil:
		what = fmt.Sprintf("%q of %s", m.Source, op.Inputs[m.Input].describe(number))
	}
	if m.Cache != nil {
		what = fmt.Sprintf("cache %q, at first %s,", m.Cache.ID, what)
	}
	at := fmt.Sprintf(" at %q", m.Dest)
	if !m.Writable {
		at += ", read-only"
	}
	return what + at
}

// Command unpriv runs a program with no more privilege than a restricted
// Kubernetes pod has. See package unpriv.
//
//	unpriv [-ro] [-rw DIR]... [-etc DIR] [-env NAME=VALUE]... [-dir DIR] [--] COMMAND [ARG]...
//	unpriv -check
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/kiln-build/kiln/test/unpriv"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "unpriv:", err)
		os.Exit(125)
	}
}

func run() error {
	o := unpriv.Options{Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}}
	flag.IntVar(&o.UID, "uid", 65532, "user `id` to become")
	flag.IntVar(&o.GID, "gid", 65532, "group `id` to become")
	flag.BoolVar(&o.ReadOnly, "ro", false, "make every mount read-only but for -rw and /proc (takes root)")
	flag.StringVar(&o.Dir, "dir", "", "working `directory`")
	flag.StringVar(&o.Etc, "etc", "", "`directory` whose files are seen over those of /etc (takes root)")
	flag.Func("rw", "`directory` that stays writable with -ro (repeatable)", func(s string) error {
		o.Writable = append(o.Writable, s)
		return nil
	})
	flag.Func("env", "`NAME=VALUE` for the program; it gets only PATH otherwise (repeatable)", func(s string) error {
		o.Env = append(o.Env, s)
		return nil
	})
	flag.BoolVar(&o.Deadly, "deadly", false, "kill a process that tries to make a namespace, mount or chroot, instead of refusing")
	check := flag.Bool("check", false, "assert that what is meant to be refused is refused")
	assert := flag.String("assert", "", "assert it of this process, with a scratch `directory`, which is removed")
	flag.Parse()
	switch {
	case *assert != "":
		err := errors.Join(unpriv.Check(*assert), os.Remove(*assert))
		if err != nil {
			return err
		}
		fmt.Println("unprivileged: all assertions hold")
		return nil
	case *check:
		dir, err := os.MkdirTemp("", "unpriv-*")
		if err != nil {
			return err
		}
		if os.Geteuid() == 0 {
			if err := os.Chown(dir, o.UID, o.GID); err != nil {
				return err
			}
		}
		return unpriv.Exec(o, []string{"/proc/self/exe", "-assert", dir})
	case flag.NArg() == 0:
		return fmt.Errorf("no command given")
	}
	return unpriv.Exec(o, flag.Args())
}

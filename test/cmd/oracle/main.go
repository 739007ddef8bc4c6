// Command oracle builds a context with BuildKit and pushes the result, as root:
//
//	oracle [-registry HOST:PORT] [-f FILE] [-target STAGE] [-opt KEY=VALUE]... -t REF DIR
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/kiln-build/kiln/test/refbuild"
)

func main() {
	var r refbuild.Request
	flag.StringVar(&r.Ref, "t", "", "`reference` to push to")
	flag.StringVar(&r.Dockerfile, "f", "", "Dockerfile's `name` in the context")
	flag.StringVar(&r.Target, "target", "", "`stage` to build")
	flag.BoolVar(&r.NoCache, "no-cache", false, "use no cache")
	flag.Func("opt", "front end option, `KEY=VALUE`: build-arg:A=1 (repeatable)", func(s string) error { r.Opts = append(r.Opts, s); return nil })
	flag.Parse()
	r.Context = flag.Arg(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, r); err != nil {
		fmt.Fprintln(os.Stderr, "oracle:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, r refbuild.Request) (err error) {
	if r.Context == "" || r.Ref == "" {
		return errors.New("give -t REFERENCE and a directory")
	}
	dir, err := os.MkdirTemp("", "oracle-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	host, _, _ := strings.Cut(r.Ref, "/")
	d, err := refbuild.Start(ctx, dir, host)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop()) }()
	out, err := d.Build(ctx, r)
	fmt.Print(out)
	return err
}

// Command base-images makes the base images of the tests into the cache
// directory, and with -push copies them to a plain-HTTP registry.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/testenv"
)

func main() {
	push := flag.String("push", "", "push the images to the registry at `HOST:PORT`")
	partial := flag.Bool("partial", false, "succeed when some images cannot be made here")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *push, *partial); err != nil {
		fmt.Fprintln(os.Stderr, "base-images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, push string, partial bool) error {
	cache, err := testenv.CacheDir()
	if err != nil {
		return err
	}
	set := baseimages.Open(cache, os.Stderr)
	err = set.Ensure(ctx)
	if errors.Is(err, baseimages.ErrMissing) && partial {
		fmt.Fprintln(os.Stderr, "base-images:", err)
		err = nil
	}
	if err != nil {
		return err
	}
	if push != "" {
		if err := set.Push(ctx, push); err != nil {
			return err
		}
	}
	for _, n := range set.Names() {
		fmt.Println(n)
	}
	return nil
}

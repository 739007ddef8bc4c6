// Command compare prints how two images differ in meaning, a line a difference,
// and exits 1 if they do. See package compare for what an image may be.
//
//	compare [-layers] [-ignore PATTERN]... [-mtime PATTERN]... IMAGE IMAGE
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/kiln-build/kiln/test/compare"
)

func main() {
	var o compare.Options
	flag.BoolVar(&o.Layers, "layers", false, "compare layer by layer as well")
	flag.Func("ignore", "`pattern` of paths not to compare (repeatable)", func(s string) error { o.Ignore = append(o.Ignore, s); return nil })
	flag.Func("mtime", "`pattern` of paths whose times to compare (repeatable)", func(s string) error { o.Mtime = append(o.Mtime, s); return nil })
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "compare: give two images")
		os.Exit(2)
	}
	equal, err := run(flag.Arg(0), flag.Arg(1), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(2)
	}
	if !equal {
		os.Exit(1)
	}
}

func run(a, b string, o compare.Options) (bool, error) {
	ia, err := compare.Open(a)
	if err != nil {
		return false, err
	}
	ib, err := compare.Open(b)
	if err != nil {
		return false, err
	}
	r, err := compare.Images(ia, ib, o)
	if err != nil {
		return false, err
	}
	fmt.Print(r)
	fmt.Printf("%d differences; %d and %d layers\n", len(r.Diffs), r.LayersA, r.LayersB)
	for _, p := range r.ProblemsA {
		fmt.Println("first image:", p)
	}
	for _, p := range r.ProblemsB {
		fmt.Println("second image:", p)
	}
	return r.Equal(), nil
}

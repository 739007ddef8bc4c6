// Command verify pulls an image whole, every digest checked, and prints the
// digest of its manifest as the sha256 of the bytes that the registry gave.
//
//	verify IMAGE
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/kiln-build/kiln/test/compare"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "verify: give one image")
		os.Exit(2)
	}
	digest, err := verify(os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, "verify:", err)
		os.Exit(1)
	}
	fmt.Println(digest)
}

func verify(ref string) (string, error) {
	img, err := compare.Open(ref)
	if err != nil {
		return "", err
	}
	r, err := compare.Images(img, img, compare.Options{}) // reads all layers
	if err != nil {
		return "", err
	}
	if len(r.ProblemsA) > 0 {
		return "", errors.New(strings.Join(r.ProblemsA, "; "))
	}
	d, err := img.Digest()
	if err != nil {
		return "", err
	}
	return d.String(), nil
}

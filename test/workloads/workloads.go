// Package workloads holds the seven builds that Kiln is measured and accepted
// with: W1 to W7, each a directory with a Dockerfile, as people write them.
// W5's context is generated, 520 MB of it, the same bytes every time.
package workloads

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kiln-build/kiln/test/testenv"
)

// Workload is one of them.
type Workload struct {
	Name string // "W1-hello-go"
	// Bases are the images it starts from.
	Bases []string
	// Edit is the file that the "one file changed" scenario changes, "" for none.
	Edit string
	from string // in Edit, replaced by to; appended if from is empty
	to   string
}

// All lists them in order.
func All() []Workload {
	const busybox, debian, golang, node = "library/busybox:latest", "library/debian:bookworm", "library/golang:1.26", "library/node:20"
	return []Workload{
		{Name: "W1-hello-go", Bases: []string{golang, busybox}, Edit: "main.go", from: "hello 1.0", to: "hello 1.1"},
		{Name: "W2-apt-python", Bases: []string{debian}, Edit: "app/util.py", from: "hello ", to: "good day "},
		{Name: "W3-node-app", Bases: []string{node}, Edit: "src/lib.js", to: "// changed\n"},
		{Name: "W4-many-layers", Bases: []string{debian}, Edit: "files/f15.txt", to: "changed\n"},
		{Name: "W5-big-context", Bases: []string{busybox}, Edit: "tree/00/e000/f000.txt", to: "changed\n"},
		{Name: "W6-parallel", Bases: []string{debian, busybox}, Edit: "Dockerfile", from: "echo d;", to: "echo D;"},
		{Name: "W7-small-change", Bases: []string{debian}, Edit: "Dockerfile", from: "echo change-5", to: "echo change-five"},
	}
}

// Find returns the workload that a name or its beginning ("W3") is for.
func Find(name string) (Workload, error) {
	for _, w := range All() {
		if w.Name == name || strings.HasPrefix(w.Name, name+"-") {
			return w, nil
		}
	}
	return Workload{}, fmt.Errorf("find workload: there is no %q", name)
}

// Write makes the workload's context in dir, which anybody may read; it must be
// empty or not there. Times are fixed.
func (w Workload) Write(dir string) error {
	root, err := testenv.Root()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// Not embedded: W1 is a Go module of its own.
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, "test", "workloads", w.Name))); err != nil {
		return fmt.Errorf("write %s: %w", w.Name, err)
	}
	if w.Name == "W5-big-context" {
		if err := bigContext(dir); err != nil {
			return fmt.Errorf("write %s: %w", w.Name, err)
		}
	}
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if w.Name != "W5-big-context" && !d.IsDir() {
			if err := os.Chmod(p, 0o644); err != nil {
				return err
			}
		}
		return os.Chtimes(p, epoch(), epoch())
	})
}

func epoch() time.Time { return time.Unix(1700000000, 0) }

// Change makes the edit of the "one file changed" scenario in a written context.
func (w Workload) Change(dir string) error {
	if w.Edit == "" {
		return errors.New("change workload: it has no edit")
	}
	p := filepath.Join(dir, filepath.FromSlash(w.Edit))
	b, err := os.ReadFile(p)
	if err != nil {
		return err
	}
	if w.from == "" {
		return os.WriteFile(p, append(b, w.to...), 0o644)
	}
	if !bytes.Contains(b, []byte(w.from)) {
		return fmt.Errorf("change %s: no %q in it", w.Edit, w.from)
	}
	return os.WriteFile(p, bytes.Replace(b, []byte(w.from), []byte(w.to), 1), 0o644)
}

// bigContext writes 20,000 small files of text and one of 500 MiB, of which
// every other MiB is random.
func bigContext(dir string) error {
	r := rand.New(rand.NewPCG(12345, 1))
	text := words(r)
	for d := range 200 {
		sub := filepath.Join(dir, "tree", fmt.Sprintf("%02d", d/20), fmt.Sprintf("e%03d", d))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		for f := range 100 {
			n := 100 + r.IntN(7900)
			o := r.IntN(len(text) - n)
			mode := fs.FileMode(0o644)
			if f%10 == 0 {
				mode = 0o755
			}
			data := append(fmt.Appendf(nil, "%d/%d\n", d, f), text[o:o+n]...)
			if err := os.WriteFile(filepath.Join(sub, fmt.Sprintf("f%03d.txt", f)), data, mode); err != nil {
				return err
			}
		}
	}
	return bigFile(filepath.Join(dir, "big.bin"), text)
}

func bigFile(name string, text []byte) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var seed [32]byte
	copy(seed[:], "kiln's big file")
	c := rand.NewChaCha8(seed)
	buf := make([]byte, 1<<20)
	for i := range 500 {
		if i%2 == 0 {
			if _, err := c.Read(buf); err != nil {
				return err
			}
		} else {
			o := int(c.Uint64() % uint64(len(text)-1<<19))
			copy(buf, text[o:o+1<<19])
			copy(buf[1<<19:], text[o:o+1<<19])
		}
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return f.Close()
}

func words(r *rand.Rand) []byte {
	vocabulary := make([][]byte, 4000)
	for i := range vocabulary {
		w := make([]byte, 3+r.IntN(9))
		for j := range w {
			w[j] = byte('a' + r.IntN(26))
		}
		vocabulary[i] = append(w, ' ')
	}
	var text []byte
	for range 200_000 {
		text = append(text, vocabulary[r.IntN(len(vocabulary))]...)
	}
	return text
}

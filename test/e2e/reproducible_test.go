package e2e

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/workloads"
)

// machine is where one of two builds runs: with a store of its own, in another
// place, with another number of CPUs.
type machine struct {
	*kilnrun.Runner
	cpus  string    // as taskset has them
	procs string    // GOMAXPROCS
	day   time.Time // of the context's files
}

// TestReproducible builds workloads twice with one SOURCE_DATE_EPOCH, on what could be two machines
// on two days: the digests are the same.
func TestReproducible(t *testing.T) {
	guard(t)
	for _, name := range []string{"W1", "W3", "W4", "W5"} {
		t.Run(name, func(t *testing.T) {
			w, err := workloads.Find(name)
			if err != nil {
				t.Fatal(err)
			}
			bed := kilnrun.Open(t, w.Bases...)
			other, err := kilnrun.New(t.Context(), filepath.Join(bed.Dir, "another"))
			if err != nil {
				t.Fatal(err)
			}
			dir := filepath.Join(bed.Dir, "context")
			if err := w.Write(dir); err != nil {
				t.Fatal(err)
			}
			deterministic(t, dir)
			var refs []string
			for i, m := range []machine{
				{bed.Runner, "0", "1", time.Date(2024, 2, 29, 23, 59, 59, 999, time.UTC)},
				{other, "0-1", "4", time.Date(2026, 10, 3, 1, 2, 3, 4, time.UTC)},
			} {
				context := dir
				if i == 1 { // elsewhere, too
					context = filepath.Join(bed.Dir, "another-context")
					if err := os.Rename(dir, context); err != nil {
						t.Fatal(err)
					}
				}
				touch(t, context, m.day)
				ref := bed.Host + "/reproducible/" + strings.ToLower(name) + ":" + m.procs
				m.build(t, bed.Host, ref, context)
				refs = append(refs, ref)
			}
			same(t, refs[0], refs[1])
		})
	}
}

// deterministic changes what of a workload's own commands would not give the same twice: npm keeps logs
// and caches that are named and dated by the time.
func deterministic(t *testing.T, dir string) {
	t.Helper()
	file := filepath.Join(dir, "Dockerfile")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(b), "RUN npm ci", "RUN --mount=type=tmpfs,target=/root/.npm npm ci")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// touch makes all files as old.
func touch(t *testing.T, dir string, day time.Time) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Chtimes(p, day, day)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (m machine) build(t *testing.T, host, ref, dir string) {
	t.Helper()
	m.Env = append(m.Env, "GOMAXPROCS="+m.procs)
	cmd := m.Command(t.Context(), "build", "--progress", "plain", "--push", "--insecure-registry", host, "--build-arg", "REGISTRY="+host,
		"--build-arg", "SOURCE_DATE_EPOCH=1600000000", "-t", ref, dir)
	if taskset, err := exec.LookPath("taskset"); err == nil {
		cmd.Path, cmd.Args = taskset, append([]string{"taskset", "-c", m.cpus}, cmd.Args...)
	}
	out, err := cmd.CombinedOutput()
	noPanic(t, string(out))
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// same fails, with what differs, unless two images have one digest.
func same(t *testing.T, a, b string) {
	t.Helper()
	da, db := digest(t, a), digest(t, b)
	if da == db {
		return
	}
	r, err := compare.Images(open(t, a), open(t, b), compare.Options{Layers: true, Mtime: []string{"*", "*/*", "*/*/*", "*/*/*/*"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Errorf("%s and %s", da, db)
	for i, d := range r.Diffs {
		if i == 40 {
			t.Errorf("and %d more", len(r.Diffs)-i)
			break
		}
		t.Errorf("%s: %s, %s", d.Where, d.A, d.B)
	}
}

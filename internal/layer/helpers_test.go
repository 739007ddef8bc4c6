package layer

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// diskUsage is how many bytes of disk a file takes.
func diskUsage(t testing.TB, p string) int64 {
	t.Helper()
	fi, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

// gnuTar makes a tar of a sparse file with GNU tar, or skips.
func gnuTar(t *testing.T, options string) []byte {
	t.Helper()
	if out, err := exec.Command("tar", "--version").Output(); err != nil || !strings.Contains(string(out), "GNU tar") {
		t.Skip("no GNU tar here")
	}
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("end"), 1<<20); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-C", dir, "--sparse"}, strings.Fields(options)...)
	out, err := exec.Command("tar", append(args, "-cf", "-", "s")...).Output()
	if err != nil {
		t.Fatal(err)
	}
	if len(out) > 100_000 {
		t.Fatalf("tar of %d bytes is not sparse", len(out))
	}
	return out
}

// cpu reports the processor time of a benchmark's turns: on a busy machine the
// only figure that means something.
func cpu(b *testing.B) {
	b.Helper()
	at := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	start := at()
	b.Cleanup(func() { b.ReportMetric(float64(at()-start)/float64(b.N)/1e6, "cpu-ms/op") })
}

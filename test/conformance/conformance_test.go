package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/refbuild"
	"github.com/kiln-build/kiln/test/testenv"
)

func TestCasesLoad(t *testing.T) {
	all, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	images := 0
	for _, c := range all {
		if c.Error == nil && c.Buildah == "" {
			images++
		}
	}
	if len(all) < 120 || images < 60 {
		t.Errorf("only %d cases, of which %d are to be the same image from buildah", len(all), images)
	}
	work := openDir(t)
	for _, c := range all {
		if err := c.Write(filepath.Join(work, c.Name)); err != nil {
			t.Errorf("%s: %v", c.Name, err)
		}
		if _, err := parse(c.Name, []byte("nonsense: x\n"+c.question)); err == nil {
			t.Errorf("%s: an unknown header key is accepted", c.Name)
		}
	}
}

// TestConformance builds every case with Kiln, and compares it with what BuildKit
// and buildah make of it. It runs when KILN_CONFORMANCE is set ("oracle": ask
// those two only, to fill the cache; "self": test BuildKit against itself, which finds
// cases whose outcome is not the same twice).
// Their answers are kept, so only the first run takes root and its time.
// KILN names another binary to test; KILN_BUILDAH=off is for machines without
// Debian 12's buildah.
func TestConformance(t *testing.T) {
	mode := os.Getenv("KILN_CONFORMANCE")
	if mode == "" {
		t.Skip("set KILN_CONFORMANCE=1; the first run takes root and some minutes: make conformance")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	cases, err := Load()
	if err != nil {
		t.Fatal(err)
	}
	b := newBed(ctx, t)
	b.askBuildKit(ctx, t, cases)
	if b.buildah != nil {
		b.askBuildah(ctx, t, cases)
	}
	if mode == "oracle" {
		return
	}
	var k builder
	if mode == "self" {
		k = b.anotherBuildKit(ctx, t)
	} else {
		k = b.kiln(ctx, t)
	}
	t.Cleanup(func() { t.Log(b.tally.String()) })
	slots := make(chan struct{}, parallel())
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			check(t.Context(), t, b, k, c)
		})
	}
}

func parallel() int {
	if n, err := strconv.Atoi(os.Getenv("KILN_PARALLEL")); err == nil && n > 0 {
		return n
	}
	return 2
}

// openDir is a temporary directory that other users can reach; t.TempDir is not.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kiln-conformance-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// bed is what all cases share: a registry with the base images, the two references' answers.
type bed struct {
	work     string
	host     string
	buildkit *reference
	buildah  *reference // nil if it was not wanted
	web      *web
	tally    tally
}

func newBed(ctx context.Context, t *testing.T) *bed {
	t.Helper()
	cache, err := testenv.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	work := openDir(t)
	reg, err := testenv.StartRegistry("127.0.0.1:0", filepath.Join(work, "registry"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	set := baseimages.Open(cache, os.Stderr)
	if err := set.Ensure(ctx); err != nil && !errors.Is(err, baseimages.ErrMissing) {
		t.Fatal(err)
	}
	bases := ""
	for _, n := range []string{"library/debian:bookworm", "library/busybox:latest"} {
		img, err := set.Image(n)
		if err != nil {
			t.Fatal(err)
		}
		d, err := img.Digest()
		if err != nil {
			t.Fatal(err)
		}
		bases += "/" + d.String()
		if err := set.Push(ctx, reg.Host, n); err != nil {
			t.Fatal(err)
		}
	}
	b := &bed{work: work, host: reg.Host, web: startWeb(t)}
	b.buildkit = &reference{name: "BuildKit", salt: "3/" + refbuild.Version + bases, answers: refbuild.Answers(filepath.Join(cache, "oracle"))}
	if os.Getenv("KILN_BUILDAH") != "off" {
		b.buildah = &reference{name: "buildah", salt: "1/" + refbuild.BuildahVersion + bases, answers: refbuild.Answers(filepath.Join(cache, "buildah"))}
	}
	return b
}

// askBuildKit asks BuildKit for what is not kept.
func (b *bed) askBuildKit(ctx context.Context, t *testing.T, cases []*Case) {
	t.Helper()
	cases = slices.DeleteFunc(slices.Clone(cases), func(c *Case) bool { return c.KilnOnly != "" })
	b.ask(ctx, t, b.buildkit, cases, func() (builder, func() error, error) {
		d, err := refbuild.Start(ctx, filepath.Join(b.work, "buildkit"), b.host)
		if err != nil {
			return nil, nil, err
		}
		return &buildkit{daemon: d, host: b.host}, d.Stop, nil
	})
	for _, c := range cases {
		switch a, err := b.buildkit.kept(c); {
		case err != nil:
			t.Errorf("%s: %v", c.Name, err)
		case a == nil: // said before
		case a.Image == nil && c.Error == nil:
			t.Errorf("%s: BuildKit cannot build it:\n%s", c.Name, a.Log)
		case a.Image != nil && c.Error != nil:
			t.Errorf("%s: BuildKit builds what is meant to fail", c.Name)
		}
	}
}

// askBuildah asks buildah for what is not kept.
func (b *bed) askBuildah(ctx context.Context, t *testing.T, cases []*Case) {
	t.Helper()
	b.ask(ctx, t, b.buildah, cases, func() (builder, func() error, error) {
		s, err := refbuild.OpenBuildah(ctx, string(b.buildah.answers), b.host)
		if err != nil {
			return nil, nil, err
		}
		return &buildah{Buildah: s, host: b.host}, s.Close, nil
	})
}

// ask starts a builder if there is a case that no answer is kept for, and asks
// it for those, four at a time.
func (b *bed) ask(ctx context.Context, t *testing.T, o *reference, cases []*Case, start func() (builder, func() error, error)) {
	t.Helper()
	var ask []*Case
	for _, c := range cases {
		if a, err := o.kept(c); err != nil || a == nil {
			ask = append(ask, c)
		}
	}
	if len(ask) == 0 {
		return
	}
	began := time.Now()
	from, stop, err := start()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	var g errgroup.Group
	g.SetLimit(4)
	for _, c := range ask {
		g.Go(func() error {
			dir := filepath.Join(b.work, o.name, c.Name)
			if err := c.Write(dir); err != nil {
				return fmt.Errorf("write %s: %w", c.Name, err)
			}
			if err := b.web.serve(c, dir); err != nil {
				return err
			}
			if err := o.ask(ctx, from, c, dir, b.host+"/"+strings.ToLower(o.name)+"/"+c.Name); err != nil {
				t.Error(err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("asked %s for %d of %d cases in %.0f s", o.name, len(ask), len(cases), time.Since(began).Seconds())
}

// anotherBuildKit has the cache directory of its own.
func (b *bed) anotherBuildKit(ctx context.Context, t *testing.T) *buildkit {
	t.Helper()
	d, err := refbuild.Start(ctx, filepath.Join(b.work, "buildkit-self"), b.host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Stop(); err != nil {
			t.Error(err)
		}
	})
	return &buildkit{daemon: d, host: b.host}
}

func (b *bed) kiln(ctx context.Context, t *testing.T) *kiln {
	t.Helper()
	r, err := kilnrun.New(ctx, filepath.Join(b.work, "kiln"))
	if err != nil {
		t.Fatal(err)
	}
	return &kiln{Runner: r, host: b.host}
}

func check(ctx context.Context, t *testing.T, b *bed, k builder, c *Case) {
	if _, ok := k.(*buildkit); ok && c.KilnOnly != "" {
		t.Skip(c.KilnOnly)
	}
	dir := filepath.Join(b.work, "context", c.Name)
	if err := c.Write(dir); err != nil {
		t.Fatal(err)
	}
	if err := b.web.serve(c, dir); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	ref := b.host + "/kiln/" + c.Name
	out, code, err := k.build(ctx, c, dir, ref)
	if err != nil {
		t.Fatalf("run kiln: %v\n%s", err, out)
	}
	if c.Error != nil {
		if code == 0 {
			t.Errorf("built what is meant to fail with %q", c.Error)
		}
		if !c.Error.MatchString(out) {
			t.Errorf("output does not match %q:\n%s", c.Error, out)
		}
		if _, ok := k.(*kiln); ok && c.Code != 0 && code != c.Code {
			t.Errorf("exit code %d, want %d:\n%s", code, c.Code, out)
		}
		if _, err := compare.Open(ref); err == nil {
			t.Error("a failed build pushed its tag")
		}
		b.secondOpinion(t, c, nil)
		return
	}
	if code != 0 {
		t.Fatalf("kiln exits with %d:\n%s", code, out)
	}
	got, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	want, err := b.buildkit.kept(c)
	if err != nil || want == nil || want.Image == nil {
		t.Fatalf("no answer of BuildKit: %v", err)
	}
	r, err := compare.Images(want.Image, got, c.Compare)
	if err != nil {
		t.Fatal(err)
	}
	report(t, c, r)
	b.secondOpinion(t, c, got)
}

// report fails the test with every difference that is not accounted for.
func report(t *testing.T, c *Case, r *compare.Report) {
	t.Helper()
	var b strings.Builder
	for _, d := range r.Diffs {
		if !c.differs(d.Where) {
			fmt.Fprintf(&b, "\n  %s: BuildKit %s, Kiln %s", d.Where, d.A, d.B)
		}
	}
	for _, p := range r.ProblemsB {
		if slices.Contains(r.ProblemsA, p) {
			continue // of the base image, or BuildKit's as well
		}
		fmt.Fprintf(&b, "\n  Kiln's layers: %s", p)
	}
	if b.Len() > 0 {
		t.Errorf("the images differ:%s", b.String())
	}
}

func (c *Case) differs(where string) bool {
	for _, p := range c.Differs {
		if ok, err := path.Match(p, where); ok && err == nil {
			return true
		}
	}
	return false
}

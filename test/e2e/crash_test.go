package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// crashing has some of everything that a build does: it pulls, copies, runs in
// two stages at once, and pushes. VARIANT makes the steps others.
const crashing = `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest AS a
ARG VARIANT
COPY data /data
RUN echo $VARIANT > /v && for i in $(seq 200); do echo $i > /data/f$i; done; head -c 3000000 /dev/zero > /data/big
RUN rm -r /data/f1* && ln /data/f2 /data/hard
FROM ${REGISTRY}/library/busybox:latest AS b
ARG VARIANT
RUN echo b-$VARIANT > /b && sleep 0.2
FROM a
COPY --from=b /b /b
RUN cat /b /v > /both && sleep 0.1
`

// process is one that runs the binary under test, by its id and start time.
type process struct {
	pid        int
	start      string
	state      string
	parent     int
	descriptor string
}

// processes lists those whose executable is bin, whatever they call
// themselves, and zombies among what was there before.
func processes(bin string, before []process) []process {
	var all []process
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		stat, err := os.ReadFile(filepath.Join(d, "stat"))
		if err != nil {
			continue
		}
		i := bytes.LastIndexByte(stat, ')')
		fields := strings.Fields(string(stat[i+1:]))
		if i < 0 || len(fields) < 20 {
			continue
		}
		parent, _ := strconv.Atoi(fields[1])
		p := process{pid: pid, start: fields[19], state: fields[0], parent: parent, descriptor: string(stat[:i+1])}
		exe, _ := os.Readlink(filepath.Join(d, "exe"))
		known := slices.ContainsFunc(before, func(q process) bool { return q.pid == p.pid && q.start == p.start })
		if exe == bin || known {
			all = append(all, p)
		}
	}
	return all
}

// allGone fails unless every process of the builder is gone within a second. A
// zombie that only init can reap is gone.
func allGone(t *testing.T, r *kilnrun.Runner, before []process, killed time.Time) {
	t.Helper()
	var left []process
	for {
		left = slices.DeleteFunc(processes(r.Bin, before), func(p process) bool { return p.state == "Z" && p.parent == 1 })
		if len(left) == 0 {
			return
		}
		if time.Since(killed) > time.Second {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("a second after its end the builder has left: %+v", left)
	time.Sleep(20 * time.Second)
	t.Logf("20 s later: %+v", processes(r.Bin, before))
}

func (r crashBed) args(variant string, more ...string) []string {
	return append([]string{
		"build", "--progress", "plain", "--push", "--build-arg", "REGISTRY=" + r.Host, "--build-arg", "VARIANT=" + variant,
		"-t", r.Host + "/crash:v" + variant,
	}, append(more, r.context)...)
}

type crashBed struct {
	*kilnrun.Bed
	context string
}

func newCrashBed(t *testing.T) crashBed {
	bed := kilnrun.Open(t, busybox)
	f := files{"Dockerfile": crashing}
	for i := range 50 {
		f[fmt.Sprintf("data/in%d", i)] = strings.Repeat(fmt.Sprintln("line", i), 100*i)
	}
	return crashBed{bed, f.write(t, filepath.Join(bed.Dir, "context"))}
}

// check builds a variant again, which must work and give the right files.
func (r crashBed) check(t *testing.T, variant string) {
	t.Helper()
	out, code := run(t, r.Runner, r.args(variant)...)
	if code != 0 {
		t.Fatalf("the next build exits with %d:\n%s", code, out)
	}
	ref := r.Host + "/crash:v" + variant
	img, err := compare.Open(ref)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := compare.Images(img, img, compare.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(rep.ProblemsB) > 0 {
		t.Errorf("the image has problems: %v", rep.ProblemsB)
	}
	fs := rootfs(t, ref)
	if got, want := fs["/both"].Data, "b-"+variant+"\n"+variant+"\n"; got != want {
		t.Errorf("/both is %q, not %q", got, want)
	}
	n := 0
	for p, e := range fs {
		if strings.HasPrefix(p, "/data/in") {
			n++
			i, _ := strconv.Atoi(strings.TrimPrefix(p, "/data/in"))
			if e.Data != strings.Repeat(fmt.Sprintln("line", i), 100*i) {
				t.Errorf("%s has other content", p)
			}
		}
	}
	if _, ok := fs["/data/f1"]; n != 50 || ok || fs["/data/f200"].Data != "200\n" || fs["/data/big"].Size != 3000000 {
		t.Errorf("/data is not what it should be: %d files from the context", n)
	}
}

// nothingLeft prunes, after which the store has no temporary file.
func (r crashBed) nothingLeft(t *testing.T, args ...string) {
	t.Helper()
	if out, code := run(t, r.Runner, append([]string{"prune"}, args...)...); code != 0 {
		t.Errorf("prune exits with %d:\n%s", code, out)
	}
	left, err := filepath.Glob(filepath.Join(r.Store(), "tmp", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v %v", left, err)
	}
}

// TestKilled kills the builder with SIGKILL at random moments of builds that
// have all or something to do.
func TestKilled(t *testing.T) {
	guard(t)
	r := newCrashBed(t)
	start := time.Now()
	r.check(t, "warm")
	warm := time.Since(start)
	r.nothingLeft(t, "--all", "--force")
	start = time.Now()
	if out, code := run(t, r.Runner, r.args("cold")...); code != 0 {
		t.Fatal(out)
	}
	cold := time.Since(start)
	t.Logf("a build takes %v (%v with the check)", cold, warm)
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	const times = 20
	ended := 0
	for i := range times {
		variant := fmt.Sprint(i)
		// One moment out of each twentieth of the build, in no order of stores.
		delay := time.Duration((float64(i) + rnd.Float64()) / times * 1.1 * float64(cold))
		if i%3 == 0 {
			r.nothingLeft(t, "--all", "--force") // the next has all to do
		}
		if !r.kill(t, variant, delay) {
			ended++
		}
		r.check(t, variant)
		r.nothingLeft(t)
		if t.Failed() {
			t.Fatalf("killed after %v, time %d", delay, i)
		}
	}
	t.Logf("%d of %d builds had ended before they were killed", ended, times)
	if ended > times/2 {
		t.Errorf("only %d of %d builds were killed", times-ended, times)
	}
}

// kill starts a build and kills it after a while; false if it had ended.
func (r crashBed) kill(t *testing.T, variant string, delay time.Duration) bool {
	t.Helper()
	var out bytes.Buffer
	cmd := r.Command(t.Context(), r.args(variant)...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, 5*time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(delay)
	before := processes(r.Bin, nil)
	killed := time.Now()
	_ = cmd.Process.Kill()
	err := cmd.Wait()
	allGone(t, r.Runner, before, killed)
	noPanic(t, out.String())
	if cmd.ProcessState.ExitCode() > 0 {
		t.Errorf("the build failed before it was killed: %v\n%s", err, out.String())
	}
	return !cmd.ProcessState.Exited()
}

// TestInterrupted: ^C and a pod's end stop a build within a second, whatever it does.
func TestInterrupted(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		for _, step := range []string{"while :; do :; done", "sleep 1000", "trap '' INT TERM HUP; while :; do sleep 1; done", "yes", "sleep 1000 & sleep 1000 & wait"} {
			t.Run(fmt.Sprintf("%v %.10s", sig, step), func(t *testing.T) {
				dir := files{"Dockerfile": "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nRUN echo be''gun; " + step + "\n"}.
					write(t, filepath.Join(bed.Dir, "context"))
				interrupt(t, bed, dir, sig)
			})
		}
	}
}

// watched is a writer that tells when something was written.
type watched struct {
	mu    sync.Mutex
	b     bytes.Buffer
	until string
	seen  chan struct{}
	once  sync.Once
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.b.Len() < 1<<20 {
		w.b.Write(p)
	}
	if strings.Contains(w.b.String(), w.until) {
		w.once.Do(func() { close(w.seen) })
	}
	return len(p), nil
}

// begin starts a command that builds, and waits until the step has said that it has begun.
func begin(ctx context.Context, t *testing.T, cmd *exec.Cmd) *watched {
	t.Helper()
	w := &watched{until: " begun", seen: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-w.seen:
	case <-ctx.Done():
		t.Fatalf("the step does not begin:\n%s", w.b.String())
	}
	return w
}

func interrupt(t *testing.T, bed *kilnrun.Bed, dir string, sig syscall.Signal) {
	ref := bed.Host + "/interrupted"
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := bed.Command(ctx, "build", "--progress", "plain", "--push", "--build-arg", "REGISTRY="+bed.Host, "-t", ref, dir)
	cmd.WaitDelay = 5 * time.Second
	w := begin(ctx, t, cmd)
	before := processes(bed.Bin, nil)
	if len(before) < 3 {
		t.Errorf("the builder, its shim and the sandbox are %d processes: %+v", len(before), before)
	}
	at := time.Now()
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	err := cmd.Wait()
	took := time.Since(at)
	allGone(t, bed.Runner, before, at)
	t.Logf("ended after %v", took)
	out := w.b.String()
	noPanic(t, out)
	if cmd.ProcessState.ExitCode() != diag.ExitInterrupted || !strings.HasSuffix(out, "ERROR: interrupted\n") {
		t.Errorf("ended with %v and %q", err, out[max(0, len(out)-200):])
	}
	if took > time.Second {
		t.Errorf("took %v to end", took)
	}
	notPushed(t, ref)
	if left, _ := filepath.Glob(filepath.Join(bed.Store(), "tmp", "*")); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
}

// TestTwoAtOnce runs builds of one Dockerfile, and of others, in one store at
// the same time, with prunes in between.
func TestTwoAtOnce(t *testing.T) {
	guard(t)
	r := newCrashBed(t)
	type result struct {
		out  string
		code int
		err  error
	}
	variants := []string{"same", "same", "other", "third", "same"}
	results := make([]result, len(variants))
	var wg sync.WaitGroup
	for i, v := range variants {
		wg.Go(func() {
			cmd := r.Command(t.Context(), r.args(v)...)
			b, err := cmd.CombinedOutput()
			results[i] = result{string(b), cmd.ProcessState.ExitCode(), err}
		})
	}
	stop := make(chan struct{})
	var pruned []string
	var prunes sync.WaitGroup
	prunes.Go(func() {
		for {
			b, err := r.Command(t.Context(), "prune").CombinedOutput()
			if err != nil {
				pruned = append(pruned, fmt.Sprintf("%v: %s", err, b))
			}
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	wg.Wait()
	close(stop)
	prunes.Wait()
	for i, res := range results {
		noPanic(t, res.out)
		if res.code != 0 {
			t.Errorf("build %d of %s: %v\n%s", i, variants[i], res.err, res.out)
		}
	}
	for _, p := range pruned {
		t.Errorf("prune: %s", p)
	}
	for _, v := range []string{"same", "other", "third"} {
		r.check(t, v)
	}
	r.nothingLeft(t)
	allGone(t, r.Runner, nil, time.Now())
}

// TestSameImage: what is built in a store in which a build was killed is what
// a new store gives, and with SOURCE_DATE_EPOCH, where no step takes the time
// from the clock, the very bytes.
func TestSameImage(t *testing.T) {
	guard(t)
	r := newCrashBed(t)
	r.kill(t, "x", 300*time.Millisecond)
	r.check(t, "x")
	old, err := compare.Open(r.Host + "/crash:vx")
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := kilnrun.New(t.Context(), filepath.Join(r.Dir, "fresh"))
	if err != nil {
		t.Fatal(err)
	}
	f := r
	f.Bed = &kilnrun.Bed{Runner: fresh, Dir: r.Dir, Host: r.Host}
	f.check(t, "x")
	now, err := compare.Open(r.Host + "/crash:vx")
	if err != nil {
		t.Fatal(err)
	}
	rep, err := compare.Images(old, now, compare.Options{Layers: true})
	if err != nil {
		t.Fatal(err)
	}
	if !rep.Equal() {
		t.Errorf("two stores, two images:\n%s", rep)
	}
	files{"Dockerfile": "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\nCOPY data/ /data/\nWORKDIR /made\nENV A=b\n"}.write(t, r.context)
	var digests []string
	for i, run := range []*kilnrun.Runner{r.Runner, fresh} {
		ref := fmt.Sprintf("%s/same:%d", r.Host, i)
		cmd := run.Command(t.Context(), "build", "--push", "--build-arg", "REGISTRY="+r.Host, "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-t", ref, r.context)
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		digests = append(digests, digest(t, ref))
		time.Sleep(1100 * time.Millisecond) // the clock must not matter
	}
	if digests[0] != digests[1] {
		t.Errorf("two stores, two digests: %v", digests)
	}
}

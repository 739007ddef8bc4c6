package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what a group of processes used. See the package comment for what is counted.
type usage struct {
	Wall        float64 `json:"wall_seconds"`
	CPU         float64 `json:"cpu_seconds"`
	PeakMemory  int64   `json:"peak_anon_shmem_bytes"`
	PeakWithRSS int64   `json:"peak_rss_bytes"`
	PeakPSS     int64   `json:"peak_pss_bytes"`
	Processes   int     `json:"peak_processes"`
}

const (
	rssEvery = 20 * time.Millisecond
	pssEvery = 250 * time.Millisecond
)

// sampler watches all descendants of this process: the bench is a subreaper, so
// that whatever loses its parent comes back to it.
type sampler struct {
	stop chan struct{}
	done chan struct{}
	u    usage
}

func startSampler() *sampler {
	s := &sampler{stop: make(chan struct{}), done: make(chan struct{})}
	go s.run()
	return s
}

func (s *sampler) run() {
	defer close(s.done)
	tick := time.NewTicker(rssEvery)
	defer tick.Stop()
	lastPSS := time.Time{}
	for {
		pss := time.Since(lastPSS) >= pssEvery
		s.sample(pss)
		if pss {
			lastPSS = time.Now()
		}
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
	}
}

func (s *sampler) finish() usage {
	close(s.stop)
	<-s.done
	return s.u
}

func (s *sampler) sample(withPSS bool) {
	var anon, all, pss int64
	pids := descendants(os.Getpid())
	for _, p := range pids {
		f := fields(filepath.Join("/proc", strconv.Itoa(p), "status"), "RssAnon", "RssShmem", "RssFile")
		anon += f["RssAnon"] + f["RssShmem"]
		all += f["RssAnon"] + f["RssShmem"] + f["RssFile"]
		if withPSS {
			g := fields(filepath.Join("/proc", strconv.Itoa(p), "smaps_rollup"), "Pss_Anon", "Pss_Shmem")
			pss += g["Pss_Anon"] + g["Pss_Shmem"]
		}
	}
	s.u.PeakMemory = max(s.u.PeakMemory, anon)
	s.u.PeakWithRSS = max(s.u.PeakWithRSS, all)
	s.u.PeakPSS = max(s.u.PeakPSS, pss)
	s.u.Processes = max(s.u.Processes, len(pids))
}

// fields reads "Name:  123 kB" lines as bytes; a process that has gone has none.
func fields(file string, names ...string) map[string]int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	m := make(map[string]int64, len(names))
	for line := range strings.Lines(string(b)) {
		k, v, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		for _, n := range names {
			if k == n {
				kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
				m[n] = kb << 10
			}
		}
	}
	return m
}

// descendants lists the processes below one, by the kernel's own lists of children.
func descendants(pid int) []int {
	var all []int
	todo := []int{pid}
	for len(todo) > 0 {
		p := todo[0]
		todo = todo[1:]
		lists, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(p), "task", "*", "children"))
		if err != nil {
			continue
		}
		for _, l := range lists {
			b, err := os.ReadFile(l)
			if err != nil {
				continue // ended meanwhile
			}
			for _, f := range strings.Fields(string(b)) {
				if c, err := strconv.Atoi(f); err == nil {
					all = append(all, c)
					todo = append(todo, c)
				}
			}
		}
	}
	return all
}

// cpuGroup counts the processor time of everything started in it, with a
// control group (version 1 or 2) where one can be made.
type cpuGroup struct {
	dir, procs, usage string
}

// newCPUGroup returns nil where no control group can be made; then what counts
// is the times that ended processes pass to their parents.
func newCPUGroup(name string) *cpuGroup {
	for _, g := range []cpuGroup{
		{dir: "/sys/fs/cgroup/cpuacct/", procs: "cgroup.procs", usage: "cpuacct.usage"},
		{dir: "/sys/fs/cgroup/", procs: "cgroup.procs", usage: "cpu.stat"},
	} {
		dir := filepath.Join(g.dir, name)
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, g.usage)); err != nil {
			_ = os.Remove(dir)
			continue
		}
		return &cpuGroup{dir: dir, procs: filepath.Join(dir, g.procs), usage: filepath.Join(dir, g.usage)}
	}
	return nil
}

// wrap makes a command start itself in the group.
func (g *cpuGroup) wrap(argv []string) []string {
	if g == nil {
		return argv
	}
	return append([]string{"/bin/sh", "-c", `echo $$ > "$0" && exec "$@"`, g.procs}, argv...)
}

// seconds is the time used so far.
func (g *cpuGroup) seconds() (float64, error) {
	b, err := os.ReadFile(g.usage)
	if err != nil {
		return 0, err
	}
	if s, ok := strings.CutPrefix(string(b), "usage_usec "); ok {
		us, err := strconv.ParseFloat(strings.TrimSpace(strings.SplitN(s, "\n", 2)[0]), 64)
		return us / 1e6, err
	}
	ns, err := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
	return ns / 1e9, err
}

func (g *cpuGroup) close() {
	if g == nil {
		return
	}
	for range 50 { // its processes may still be ending
		if os.Remove(g.dir) == nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// childrenSeconds is the processor time of all waited-for descendants of this process.
func childrenSeconds() float64 {
	var r unix.Rusage
	if unix.Getrusage(unix.RUSAGE_CHILDREN, &r) != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano()).Seconds()
}

// measure runs f and says what this process's descendants used meanwhile.
func measure(ctx context.Context, g *cpuGroup, f func(context.Context) error) (usage, error) {
	cpu := func() float64 {
		if g != nil {
			if s, err := g.seconds(); err == nil {
				return s
			}
		}
		return childrenSeconds()
	}
	before := cpu()
	s := startSampler()
	start := time.Now()
	err := f(ctx)
	wall := time.Since(start)
	u := s.finish()
	u.Wall = wall.Seconds()
	u.CPU = cpu() - before
	return u, err
}

// counter counts the bytes that clients send to a registry in request bodies, and
// what they get in answers.
type counter struct{ sent, got atomic.Int64 }

func (c *counter) wrap(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = &countedBody{ReadCloser: r.Body, c: c}
		h.ServeHTTP(&countedAnswer{ResponseWriter: w, c: c}, r)
	})
}

// take returns the counts and starts again at zero.
func (c *counter) take() (sent, got int64) { return c.sent.Swap(0), c.got.Swap(0) }

type countedAnswer struct {
	http.ResponseWriter
	c *counter
}

func (a *countedAnswer) Write(p []byte) (int, error) {
	n, err := a.ResponseWriter.Write(p)
	a.c.got.Add(int64(n))
	return n, err
}

func (a *countedAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

type countedBody struct {
	io.ReadCloser
	c *counter
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.c.sent.Add(int64(n))
	return n, err
}

// reap waits for orphans that came to this process, until ctx ends.
func becomeSubreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	return nil
}

// orphans remembers which children are known, so that only strangers are waited for.
type orphans struct {
	mu    sync.Mutex
	known map[int]bool
}

func (o *orphans) expect(pid int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.known[pid] = true
}

// reap waits for ended children that were not started here.
func (o *orphans) reap() {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			continue
		}
		for _, f := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				continue
			}
			o.mu.Lock()
			ours := o.known[pid]
			o.mu.Unlock()
			if !ours {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
}

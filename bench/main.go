// Command bench builds the workloads W1 to W7 with Kiln, and with -oracle by
// BuildKit's side, with -server by Kiln behind BuildKit's API and buildctl, and prints what each cost:
//
//	go run ./bench [-n 3] [-server] [-oracle] [-json FILE] [-kiln FILE] [-privileged] [W1 W2 ...]
//
// Six scenarios, in this order: in one store cold (empty, base images in the
// registry), unchanged (the same again), changed (one file of the context), and export
// (the unchanged again, and all its cache to the registry); then, in an empty store each and with
// that cache, registry (the unchanged again) and reg-changed (one file of the context).
// Every run is a fresh store and a fresh registry on loopback; with -n, medians
// are printed, in a table of all that is counted, and in one of wall times side by side.
//
// What is counted: wall time of the command; user and system time of all its
// processes, by a control group where one can be made (else what ended
// processes pass to their parents); memory is the sum over all processes that
// descend from the builder, sampled every 20 ms, of RssAnon + RssShmem, so
// program text and mapped files do not count (peak_rss in the JSON has them),
// but memory that processes share counts once for each of them (peak_pss,
// sampled every 250 ms, shares it out); image size is the sum of the manifest's
// compressed layers and config; bytes sent are those of request bodies at the
// registry, bytes received those of its answers. BuildKit's daemon is one of its processes. The registry runs in the
// bench itself and is not counted. As root, Kiln runs as uid 65532 without any
// capability, with docker's seccomp profile and a read-only view of the machine.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/testenv"
	"github.com/kiln-build/kiln/test/workloads"
)

// result is one build.
type result struct {
	Workload string `json:"workload"`
	Scenario string `json:"scenario"`
	Builder  string `json:"builder"`
	usage
	ImageBytes int64 `json:"image_bytes"`
	Layers     int   `json:"layers"`
	SentBytes  int64 `json:"sent_bytes"`
	GotBytes   int64 `json:"received_bytes"`
}

func main() {
	n := flag.Int("n", 3, "`runs` of each workload")
	oracle := flag.Bool("oracle", false, "build with BuildKit as well (takes root)")
	server := flag.Bool("server", false, "build through kiln buildkitd as well (takes root)")
	only := flag.Bool("only-oracle", false, "build with BuildKit only")
	jsonFile := flag.String("json", "", "write all results to this `file`")
	kiln := flag.String("kiln", "", "the binary to test (default: built from this repository)")
	privileged := flag.Bool("privileged", false, "as root, run Kiln as root")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b := bench{n: *n, log: os.Stderr, orphans: &orphans{known: map[int]bool{}}}
	if err := b.main(ctx, *kiln, *privileged, *server, *oracle || *only, *only, *jsonFile, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	n        int
	log      *os.File
	orphans  *orphans
	work     string
	bases    *baseimages.Set
	builders []builder
	results  []result
}

func (b *bench) main(ctx context.Context, kiln string, privileged, server, oracle, only bool, jsonFile string, names []string) error {
	if err := becomeSubreaper(); err != nil {
		return err
	}
	ws, err := selected(names)
	if err != nil {
		return err
	}
	if !only {
		k, err := newKiln(ctx, kiln, privileged, b.orphans)
		if err != nil {
			return err
		}
		b.builders = append(b.builders, k)
		if server {
			own := *k
			b.builders = append(b.builders, &kilnServer{kiln: &own})
		}
	}
	if oracle {
		b.builders = append(b.builders, &buildkit{orphans: b.orphans})
	}
	cache, err := testenv.CacheDir()
	if err != nil {
		return err
	}
	b.bases = baseimages.Open(cache, b.log)
	if err := b.bases.Ensure(ctx); err != nil {
		return err
	}
	if b.work, err = os.MkdirTemp("", "kiln-bench-*"); err != nil {
		return err
	}
	defer os.RemoveAll(b.work)
	if err := os.Chmod(b.work, 0o755); err != nil {
		return err
	}
	for _, w := range ws {
		if err := b.workload(ctx, w); err != nil {
			return fmt.Errorf("%s: %w", w.Name, err)
		}
	}
	printTable(os.Stdout, b.results)
	fmt.Println()
	printWalls(os.Stdout, b.results)
	if jsonFile == "" {
		return nil
	}
	data, err := json.MarshalIndent(b.results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(jsonFile, append(data, '\n'), 0o644)
}

func selected(names []string) ([]workloads.Workload, error) {
	if len(names) == 0 {
		return workloads.All(), nil
	}
	var ws []workloads.Workload
	for _, n := range names {
		w, err := workloads.Find(n)
		if err != nil {
			return nil, err
		}
		ws = append(ws, w)
	}
	return ws, nil
}

// workload runs all scenarios n times for every builder.
func (b *bench) workload(ctx context.Context, w workloads.Workload) error {
	for run := range b.n {
		for _, bld := range b.builders {
			if err := b.once(ctx, w, bld, run); err != nil {
				return fmt.Errorf("%s: %w", bld.name(), err)
			}
		}
	}
	return nil
}

// scenario is one of the builds of a workload, in their order.
type scenario struct {
	name     string
	fresh    bool // in an empty store
	again    bool // with the context as it was at first
	change   bool // with one file of it changed
	from, to bool // with the cache in the registry, or writing it
}

func scenarios() []scenario {
	return []scenario{
		{name: "cold"},
		{name: "unchanged"},
		{name: "changed", change: true},
		{name: "export", again: true, to: true},
		{name: "registry", fresh: true, from: true},
		{name: "reg-changed", fresh: true, change: true, from: true},
	}
}

func (b *bench) once(ctx context.Context, w workloads.Workload, bld builder, run int) (err error) {
	dir := filepath.Join(b.work, fmt.Sprintf("%s-%s-%d", bld.name(), w.Name, run))
	defer os.RemoveAll(dir)
	contextDir := filepath.Join(dir, "context")
	if err := w.Write(contextDir); err != nil {
		return err
	}
	var moved counter
	reg, err := testenv.StartRegistry("127.0.0.1:0", filepath.Join(dir, "registry"), moved.wrap)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	if err := b.bases.Push(ctx, reg.Host, w.Bases...); err != nil {
		return err
	}
	g := newCPUGroup(fmt.Sprintf("kiln-bench-%d", os.Getpid()))
	defer g.close()
	start := func() error { return bld.start(ctx, filepath.Join(dir, bld.name()), reg.Host, g) }
	if err := start(); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bld.stop()) }()
	for _, sc := range scenarios() {
		if sc.fresh {
			if err := errors.Join(bld.stop(), start()); err != nil {
				return err
			}
		}
		if sc.again {
			if err := errors.Join(os.RemoveAll(contextDir), w.Write(contextDir)); err != nil {
				return err
			}
		}
		if sc.change {
			if err := w.Change(contextDir); err != nil {
				return err
			}
		}
		r, err := b.measured(ctx, g, &moved, bld, w, sc, contextDir, reg.Host)
		if err != nil {
			return fmt.Errorf("%s: %w", sc.name, err)
		}
		fmt.Fprintf(b.log, "%s %-9s %-11s run %d: %.2f s\n", time.Now().Format(time.TimeOnly), bld.name(), sc.name, run+1, r.Wall)
		b.results = append(b.results, r)
	}
	return nil
}

// measured is one build.
func (b *bench) measured(ctx context.Context, g *cpuGroup, moved *counter, bld builder, w workloads.Workload, sc scenario, contextDir, host string) (result, error) {
	name := strings.ToLower(w.Name)
	j := job{context: contextDir, ref: host + "/bench/" + name + ":latest"}
	cache := host + "/cache/" + name + ":latest"
	if sc.from {
		j.cacheFrom = cache
	}
	if sc.to {
		j.cacheTo = cache
	}
	moved.take()
	u, err := measure(ctx, g, func(ctx ctxT) error { return bld.build(ctx, j) })
	if err != nil {
		return result{}, err
	}
	b.orphans.reap()
	r := result{Workload: w.Name, Scenario: sc.name, Builder: bld.name(), usage: u}
	r.SentBytes, r.GotBytes = moved.take()
	r.ImageBytes, r.Layers, err = imageSize(j.ref)
	return r, err
}

type ctxT = context.Context

func imageSize(ref string) (int64, int, error) {
	img, err := compare.Open(ref)
	if err != nil {
		return 0, 0, err
	}
	m, err := img.Manifest()
	if err != nil {
		return 0, 0, err
	}
	n := m.Config.Size
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, len(m.Layers), nil
}

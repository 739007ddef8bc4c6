// Command bench builds the workloads W1 to W7 with Kiln, and with -oracle by
// BuildKit's side, and prints what each cost:
//
//	go run ./bench [-n 3] [-oracle] [-json FILE] [-kiln FILE] [-privileged] [W1 W2 ...]
//
// Three scenarios, in this order in one store: cold (empty store, base images
// in the registry), unchanged (the same again), changed (one file of the
// context). Every run is a fresh store and a fresh registry on loopback; with
// -n, medians are printed.
//
// What is counted: wall time of the command; user and system time of all its
// processes, by a control group where one can be made (else what ended
// processes pass to their parents); memory is the sum over all processes that
// descend from the builder, sampled every 20 ms, of RssAnon + RssShmem, so
// program text and mapped files do not count (peak_rss in the JSON has them),
// but memory that processes share counts once for each of them (peak_pss,
// sampled every 250 ms, shares it out); image size is the sum of the manifest's
// compressed layers and config; bytes sent are those of request bodies at the
// registry. BuildKit's daemon is one of its processes. The registry runs in the
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
}

func main() {
	n := flag.Int("n", 3, "`runs` of each workload")
	oracle := flag.Bool("oracle", false, "build with BuildKit as well (takes root)")
	only := flag.Bool("only-oracle", false, "build with BuildKit only")
	jsonFile := flag.String("json", "", "write all results to this `file`")
	kiln := flag.String("kiln", "", "the binary to test (default: built from this repository)")
	privileged := flag.Bool("privileged", false, "as root, run Kiln as root")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b := bench{n: *n, log: os.Stderr, orphans: &orphans{known: map[int]bool{}}}
	if err := b.main(ctx, *kiln, *privileged, *oracle || *only, *only, *jsonFile, flag.Args()); err != nil {
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

func (b *bench) main(ctx context.Context, kiln string, privileged, oracle, only bool, jsonFile string, names []string) error {
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

func (b *bench) once(ctx context.Context, w workloads.Workload, bld builder, run int) (err error) {
	dir := filepath.Join(b.work, fmt.Sprintf("%s-%s-%d", bld.name(), w.Name, run))
	defer os.RemoveAll(dir)
	context := filepath.Join(dir, "context")
	if err := w.Write(context); err != nil {
		return err
	}
	var sent counter
	reg, err := testenv.StartRegistry("127.0.0.1:0", filepath.Join(dir, "registry"), sent.wrap)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reg.Close()) }()
	if err := b.bases.Push(ctx, reg.Host, w.Bases...); err != nil {
		return err
	}
	g := newCPUGroup(fmt.Sprintf("kiln-bench-%d", os.Getpid()))
	defer g.close()
	if err := bld.start(ctx, filepath.Join(dir, bld.name()), reg.Host, g); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bld.stop()) }()
	for _, scenario := range []string{"cold", "unchanged", "changed"} {
		if scenario == "changed" {
			if err := w.Change(context); err != nil {
				return err
			}
		}
		sent.take()
		ref := reg.Host + "/bench/" + strings.ToLower(w.Name) + ":latest"
		u, err := measure(ctx, g, func(ctx ctxT) error { return bld.build(ctx, context, ref) })
		if err != nil {
			return fmt.Errorf("%s: %w", scenario, err)
		}
		b.orphans.reap()
		r := result{Workload: w.Name, Scenario: scenario, Builder: bld.name(), usage: u, SentBytes: sent.take()}
		if r.ImageBytes, r.Layers, err = imageSize(ref); err != nil {
			return err
		}
		fmt.Fprintf(b.log, "%s %-9s %-9s run %d: %.2f s\n", time.Now().Format(time.TimeOnly), bld.name(), scenario, run+1, u.Wall)
		b.results = append(b.results, r)
	}
	return nil
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

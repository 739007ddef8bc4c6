package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// key is what medians are taken over the runs of.
type key struct{ workload, scenario, builder string }

// medians condenses the runs, in the order in which they were first seen.
func medians(all []result) []result {
	var order []key
	groups := map[key][]result{}
	for _, r := range all {
		k := key{r.Workload, r.Scenario, r.Builder}
		if groups[k] == nil {
			order = append(order, k)
		}
		groups[k] = append(groups[k], r)
	}
	var out []result
	for _, k := range order {
		g := groups[k]
		m := g[0]
		m.Wall = median(g, func(r result) float64 { return r.Wall })
		m.CPU = median(g, func(r result) float64 { return r.CPU })
		m.PeakMemory = int64(median(g, func(r result) float64 { return float64(r.PeakMemory) }))
		m.PeakWithRSS = int64(median(g, func(r result) float64 { return float64(r.PeakWithRSS) }))
		m.PeakPSS = int64(median(g, func(r result) float64 { return float64(r.PeakPSS) }))
		m.SentBytes = int64(median(g, func(r result) float64 { return float64(r.SentBytes) }))
		m.GotBytes = int64(median(g, func(r result) float64 { return float64(r.GotBytes) }))
		m.ImageBytes = int64(median(g, func(r result) float64 { return float64(r.ImageBytes) }))
		out = append(out, m)
	}
	return out
}

func median(g []result, f func(result) float64) float64 {
	v := make([]float64, len(g))
	for i, r := range g {
		v[i] = f(r)
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// printTable prints medians, and for Kiln its ratio to BuildKit where both ran.
func printTable(w io.Writer, all []result) {
	ms := medians(all)
	oracle := map[key]result{}
	for _, m := range ms {
		if m.Builder == "buildkit" {
			oracle[key{m.Workload, m.Scenario, ""}] = m
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "workload\tscenario\tbuilder\twall s\tcpu s\tmem MiB\tpss MiB\timage MiB\tsent MiB\tgot MiB\tlayers\twall ratio\tcpu ratio\tmem ratio\t")
	for _, m := range ms {
		ratios := "\t\t\t"
		if o, ok := oracle[key{m.Workload, m.Scenario, ""}]; ok && m.Builder != "buildkit" {
			ratios = fmt.Sprintf("%s\t%s\t%s\t", ratio(m.Wall, o.Wall), ratio(m.CPU, o.CPU), ratio(float64(m.PeakMemory), float64(o.PeakMemory)))
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%.2f\t%.2f\t%.0f\t%.0f\t%.1f\t%.2f\t%.2f\t%d\t%s\n", m.Workload, m.Scenario, m.Builder, m.Wall, m.CPU,
			mib(m.PeakMemory), mib(m.PeakPSS), mib(m.ImageBytes), mib(m.SentBytes), mib(m.GotBytes), m.Layers, ratios)
	}
	_ = t.Flush()
}

func ratio(a, b float64) string {
	if b == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", a/b)
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// printWalls prints the median wall times of each workload side by side: without a
// cache, with the store's, with the registry's.
func printWalls(w io.Writer, all []result) {
	walls := map[key]float64{}
	var rows []key
	for _, m := range medians(all) {
		walls[key{m.Workload, m.Scenario, m.Builder}] = m.Wall
		if row := (key{m.Workload, "", m.Builder}); !slices.Contains(rows, row) {
			rows = append(rows, row)
		}
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "wall s\tbuilder\tcold\twarm-local\twarm-registry\tchanged-local\tchanged-registry\texport\t")
	for _, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t", r.workload, r.builder)
		for _, sc := range []string{"cold", "unchanged", "registry", "changed", "reg-changed", "export"} {
			if s, ok := walls[key{r.workload, sc, r.builder}]; ok {
				fmt.Fprintf(t, "%.2f\t", s)
			} else {
				fmt.Fprint(t, "-\t")
			}
		}
		fmt.Fprintln(t)
	}
	_ = t.Flush()
}

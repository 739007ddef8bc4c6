package store

import (
	"context"
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"sort"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// PruneOptions says what a Prune keeps besides tagged images and what running
// builds may use. Sizes are bytes on disk. The zero value keeps nothing.
type PruneOptions struct {
	// KeepFor spares records that were used within this time, and what they
	// mention. 0 spares none, unless there is a Limit.
	KeepFor time.Duration
	// Limit spares records, the last used first, with what they mention, as
	// long as the store keeps to it. With KeepFor both must hold. What tags and
	// running builds need stays even if it is more.
	Limit
	// Only says which records may go at all, with what only they mention; nil: all.
	Only func(Record) bool
	// Keep are blobs and layers that stay, with what they need.
	Keep []string
	// DryRun only reports.
	DryRun bool
}

// Limit is how large a store may become. The zero value says nothing.
type Limit struct {
	MaxUsed  int64 // the store is not to be larger; 0: it may be
	MinFree  int64 // so much of its disk is to be free
	Reserved int64 // but so much it may have in any case
}

// IsZero reports whether the limit says nothing.
func (l Limit) IsZero() bool { return l == Limit{} }

// bytes is how large a store may be that has total bytes now, on a disk of which
// free are free.
func (l Limit) bytes(total, free int64) int64 {
	keep := l.MaxUsed
	if short := l.MinFree - free; l.MinFree > 0 && short > 0 {
		if keep == 0 || total-short < keep {
			keep = max(total-short, 1)
		}
	} else if l.MinFree > 0 && keep == 0 {
		keep = total
	}
	return max(keep, l.Reserved)
}

// Record describes a record.
type Record struct {
	Kind, Key string
	Used      time.Time
	Mentions  []string // digests that are written in it
	Body      []byte
}

// PruneReport says what was removed, or would be.
type PruneReport struct {
	Blobs, Layers, Records, Temp int
	Bytes                        int64
	// Gone are the digests of the blobs and the diff IDs of the layers that were removed.
	Gone map[string]bool
	// InUse is what only a running build keeps.
	InUse int64
}

// pruneLock is the name of the lock that one who prunes holds.
const pruneLock = "kiln prune"

// useSlack covers clocks that disagree: this process's and a file server's.
const useSlack = 10 * time.Second

// Prune removes what nothing needs. Builds may run meanwhile: what they have
// found or made since their Use is spared, and their store operations wait
// for moments only.
func (s *Store) Prune(ctx context.Context, opt PruneOptions) (PruneReport, error) {
	unlock, err := s.Lock(ctx, pruneLock)
	if err != nil {
		return PruneReport{}, err
	}
	defer unlock()
	return s.prune(ctx, opt)
}

// prune is Prune, by the one who has the lock.
func (s *Store) prune(ctx context.Context, opt PruneOptions) (PruneReport, error) {
	rep := PruneReport{Gone: map[string]bool{}}
	if !opt.DryRun {
		n, size := s.sweepTemp()
		rep.Temp, rep.Bytes = n, size
	}
	// The order matters. Whoever begins after the uses are listed marks what it
	// finds as used later than the inventory says, and sweep will see that.
	inv, err := s.inventory()
	if err != nil {
		return rep, fmt.Errorf("prune store: %w", err)
	}
	if err := s.markRoots(inv, opt, &rep); err != nil {
		return rep, fmt.Errorf("prune store: %w", err)
	}
	for _, part := range []struct {
		n    *int
		objs []*object
	}{
		// What names others before what is named.
		{&rep.Records, inv.records}, {&rep.Layers, values(inv.layers)}, {&rep.Blobs, values(inv.blobs)},
	} {
		gone := func(o *object) {
			*part.n++
			rep.Bytes += allocated(o.info)
			if o.digest != "" {
				rep.Gone[o.digest] = true
			}
		}
		if err := s.sweep(ctx, part.objs, opt.DryRun, gone); err != nil {
			return rep, fmt.Errorf("prune store: %w", err)
		}
	}
	return rep, nil
}

func values(m map[string]*object) []*object {
	objs := make([]*object, 0, len(m))
	for _, o := range m {
		objs = append(objs, o)
	}
	return objs
}

// markRoots marks what tags, running builds and the spared records need.
func (s *Store) markRoots(inv *inventory, opt PruneOptions, rep *PruneReport) error {
	oldest, err := s.oldestUse()
	if err != nil {
		return err
	}
	tags, err := s.Tags()
	if err != nil {
		return err
	}
	var m marking
	for _, t := range tags {
		inv.mark(&m, string(t.Descriptor.Digest))
	}
	inv.mark(&m, opt.Keep...)
	total := m.bytes()
	if !oldest.IsZero() {
		rep.InUse = inv.markUsed(oldest.Add(-useSlack)).bytes()
		total += rep.InUse
	}
	var candidates []*object
	for _, o := range inv.records {
		switch {
		case o.marked || o.isLink():
		case opt.Only != nil && !opt.Only(o.record()):
			var m marking
			inv.markRecord(&m, o)
			total += m.bytes()
		default:
			candidates = append(candidates, o)
		}
	}
	if opt.KeepFor <= 0 && opt.IsZero() {
		return nil
	}
	free, err := s.free()
	if err != nil {
		return err
	}
	inv.markLastUsed(candidates, total, opt.bytes(inv.bytes(), free), opt)
	return nil
}

// markLastUsed marks the records that were used last, as long as they are not too old
// and, with a limit, all that is marked is no more than that; total is what is already.
func (inv *inventory) markLastUsed(records []*object, total, limit int64, opt PruneOptions) {
	sort.Slice(records, func(i, j int) bool { return records[i].used().After(records[j].used()) })
	now := time.Now()
	for _, o := range records {
		if opt.KeepFor > 0 && now.Sub(o.used()) > opt.KeepFor {
			return
		}
		var m marking
		inv.markRecord(&m, o)
		if total += m.bytes(); !opt.IsZero() && total > limit {
			m.undo()
			return
		}
	}
}

// markUsed marks what was used since a time, with all that it needs.
func (inv *inventory) markUsed(since time.Time) marking {
	var m marking
	for _, objs := range []map[string]*object{inv.blobs, inv.layers} {
		for d, o := range objs {
			if !o.used().Before(since) {
				inv.mark(&m, d)
			}
		}
	}
	for _, o := range inv.records {
		if !o.used().Before(since) {
			inv.markRecord(&m, o)
		}
	}
	return m
}

// sweepBatch bounds how long builds may have to wait for the gate.
const sweepBatch = 64

// sweep removes what is not marked and was not used since the inventory.
func (s *Store) sweep(ctx context.Context, objs []*object, dry bool, out func(*object)) error {
	var dead []*object
	for _, o := range objs {
		if !o.marked {
			dead = append(dead, o)
		}
	}
	for len(dead) > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		batch := dead[:min(len(dead), sweepBatch)]
		dead = dead[len(batch):]
		gone := make([]string, 0, len(batch))
		if err := s.sweepOut(batch, dry, func(o *object, to string) {
			out(o)
			gone = append(gone, to)
		}); err != nil {
			return err
		}
		// Freeing a large file takes long: not behind the gate.
		for _, p := range gone {
			if p != "" {
				os.Remove(p)
			}
		}
	}
	return nil
}

func (s *Store) sweepOut(batch []*object, dry bool, out func(o *object, to string)) error {
	open, err := s.gate(unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer open()
	for _, o := range batch {
		fi, err := os.Lstat(o.path)
		if err != nil || !os.SameFile(fi, o.info) || !fi.ModTime().Equal(o.used()) {
			continue
		}
		if dry {
			out(o, "")
			continue
		}
		to := s.path(dirTmp, "pruned-"+rand.Text())
		if err := os.Rename(o.path, to); err != nil {
			return err
		}
		out(o, to)
	}
	return nil
}

// Usage is how much of what is in a store.
type Usage struct {
	Blobs, Layers, Records, Tags, Temp Amount
}

// Amount is a number of files and their bytes on disk.
type Amount struct {
	Count int
	Bytes int64
}

// Total is the sum of all bytes.
func (u Usage) Total() int64 {
	return u.Blobs.Bytes + u.Layers.Bytes + u.Records.Bytes + u.Tags.Bytes + u.Temp.Bytes
}

// Usage counts the store's files.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	var u Usage
	for dir, a := range map[string]*Amount{dirBlobs: &u.Blobs, dirLayers: &u.Layers, dirRecords: &u.Records, dirTags: &u.Tags} {
		err := eachFile(s.path(dir), func(_ string, fi fs.FileInfo) error {
			a.Count++
			a.Bytes += allocated(fi)
			return context.Cause(ctx)
		})
		if err != nil {
			return Usage{}, fmt.Errorf("measure store: %w", err)
		}
	}
	es, err := os.ReadDir(s.path(dirTmp))
	if err != nil {
		return Usage{}, fmt.Errorf("measure store: %w", err)
	}
	for _, e := range es {
		u.Temp.Count++
		u.Temp.Bytes += treeSize(s.path(dirTmp, e.Name()))
	}
	return u, nil
}

// allocated is what a file takes on disk; sparse files take less than their size.
func allocated(fi fs.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}

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
// builds may use.
type PruneOptions struct {
	// KeepFor spares records that were used within this time, and what they
	// mention. 0 spares none, unless KeepSize is set.
	KeepFor time.Duration
	// KeepSize spares records, the last used first, with what they mention,
	// as long as the whole store is not larger. With KeepFor both must
	// hold. What tags and running builds need stays even if it is more.
	KeepSize int64
	// DryRun only reports.
	DryRun bool
}

// PruneReport says what was removed, or would be.
type PruneReport struct {
	Blobs, Layers, Records, Temp int
	Bytes                        int64
	// InUse is what only a running build keeps.
	InUse int64
}

// useSlack covers clocks that disagree: this process's and a file server's.
const useSlack = 10 * time.Second

// Prune removes what nothing needs. Builds may run meanwhile: what they have
// found or made since their Use is spared, and their store operations wait
// for moments only.
func (s *Store) Prune(ctx context.Context, opt PruneOptions) (PruneReport, error) {
	unlock, err := s.Lock(ctx, "kiln prune")
	if err != nil {
		return PruneReport{}, err
	}
	defer unlock()
	var rep PruneReport
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
		if err := s.sweep(ctx, part.objs, opt.DryRun, part.n, &rep.Bytes); err != nil {
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
	total := m.bytes()
	if !oldest.IsZero() {
		rep.InUse = inv.markUsed(oldest.Add(-useSlack))
		total += rep.InUse
	}
	if opt.KeepFor <= 0 && opt.KeepSize <= 0 {
		return nil
	}
	sort.Slice(inv.records, func(i, j int) bool { return inv.records[i].used().After(inv.records[j].used()) })
	now := time.Now()
	for _, o := range inv.records {
		if o.marked || o.isLink() {
			continue
		}
		if opt.KeepFor > 0 && now.Sub(o.used()) > opt.KeepFor {
			break
		}
		var m marking
		inv.markRecord(&m, o)
		if total += m.bytes(); opt.KeepSize > 0 && total > opt.KeepSize {
			m.undo()
			break
		}
	}
	return nil
}

// markUsed marks what was used since a time, with all that it needs.
func (inv *inventory) markUsed(since time.Time) int64 {
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
	return m.bytes()
}

// sweepBatch bounds how long builds may have to wait for the gate.
const sweepBatch = 64

// sweep removes what is not marked and was not used since the inventory.
func (s *Store) sweep(ctx context.Context, objs []*object, dry bool, n *int, bytes *int64) error {
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
			*n++
			*bytes += o.info.Size()
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

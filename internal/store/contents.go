package store

import (
	"fmt"
	"time"
)

// Content is a blob, or a layer with what links mention of it: its compressed forms.
type Content struct {
	Digest   string // of the blob, or the layer's diff ID
	Layer    bool
	Document bool  // a blob that is JSON: a manifest or config
	Size     int64 // bytes on disk, of all of it
	Used     time.Time
	Tagged   bool // an image with a name needs it
	InUse    bool // a running build may need it
}

// Contents lists all blobs and layers. It does not count as a use.
func (s *Store) Contents() ([]Content, error) {
	inv, err := s.inventory()
	if err != nil {
		return nil, fmt.Errorf("list the store's content: %w", err)
	}
	tags, err := s.Tags()
	if err != nil {
		return nil, err
	}
	var tagged marking
	for _, t := range tags {
		inv.mark(&tagged, string(t.Descriptor.Digest))
	}
	isTagged := tagged.digests()
	tagged.undo()
	oldest, err := s.oldestUse()
	if err != nil {
		return nil, fmt.Errorf("list the store's content: %w", err)
	}
	var inUse map[string]bool
	if !oldest.IsZero() {
		inUse = inv.markUsed(oldest.Add(-useSlack)).digests()
	}
	forms := inv.forms()
	var all []Content
	for d, l := range inv.layers {
		c := Content{Digest: d, Layer: true, Size: allocated(l.info), Used: l.used(), Tagged: isTagged[d], InUse: inUse[d]}
		for _, b := range forms[d] {
			c.Size += allocated(b.info)
			c.Tagged, c.InUse = c.Tagged || isTagged[b.digest], c.InUse || inUse[b.digest]
			if b.used().After(c.Used) {
				c.Used = b.used()
			}
			delete(inv.blobs, b.digest)
		}
		all = append(all, c)
	}
	for d, b := range inv.blobs {
		all = append(all, Content{
			Digest: d, Document: isDocument(b.path, b.info.Size()), Size: allocated(b.info), Used: b.used(), Tagged: isTagged[d], InUse: inUse[d],
		})
	}
	return all, nil
}

// forms are the blobs that links mention, by layer, each with one layer.
func (inv *inventory) forms() map[string][]*object {
	taken := map[*object]bool{}
	forms := map[string][]*object{}
	for d := range inv.layers {
		for _, link := range inv.links[d] {
			for _, m := range recordMentions(link) {
				if b := inv.blobs[m]; b != nil && !taken[b] {
					taken[b] = true
					forms[d] = append(forms[d], b)
				}
			}
		}
	}
	return forms
}

func (m marking) digests() map[string]bool {
	all := make(map[string]bool, len(m))
	for _, o := range m {
		if o.digest != "" {
			all[o.digest] = true
		}
	}
	return all
}

// EachRecord calls fn for every record, of whatever kind, in no particular order. It does
// not count as a use.
func (s *Store) EachRecord(fn func(Record) error) error {
	inv, err := s.inventory()
	if err != nil {
		return fmt.Errorf("list the store's records: %w", err)
	}
	for _, o := range inv.records {
		if r := o.record(); r.Key != "" {
			if err := fn(r); err != nil {
				return err
			}
		}
	}
	return nil
}

package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sort"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Tag is a name for an image in the store.
type Tag struct {
	Ref        string
	Descriptor ocispec.Descriptor // of its manifest or index
	Time       time.Time          // when it was set
}

type tagRecord struct {
	Descriptor ocispec.Descriptor `json:"descriptor"`
	Time       time.Time          `json:"time"`
}

// SetTag gives ref to what d describes, and takes it from whatever had it. What
// the image consists of and is in the store stays there while the tag does.
func (s *Store) SetTag(ref string, d ocispec.Descriptor) error {
	p, err := s.tagPath(ref)
	if err != nil {
		return err
	}
	if _, err := checkDigest(d.Digest); err != nil {
		return fmt.Errorf("set tag %q: %w", clip(ref), err)
	}
	b, err := json.Marshal(tagRecord{d, time.Now().UTC()})
	if err != nil {
		return fmt.Errorf("set tag %q: %w", clip(ref), err)
	}
	// A Prune that looked at the tags before must not remove it now.
	open, err := s.gate(unix.LOCK_SH)
	if err != nil {
		return fmt.Errorf("set tag %q: %w", clip(ref), err)
	}
	defer open()
	s.touchAll(string(d.Digest))
	if err := s.writeRecord(p, ref, b); err != nil {
		return s.writing("tag", err)
	}
	return nil
}

// Tag returns what a tag names, or fs.ErrNotExist.
func (s *Store) Tag(ref string) (ocispec.Descriptor, error) {
	p, err := s.tagPath(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	t, err := readTag(p)
	if err == nil && t.Ref != ref {
		err = fs.ErrNotExist
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("tag %q: %w", clip(ref), err)
	}
	return t.Descriptor, nil
}

// DeleteTag removes a tag; fs.ErrNotExist if there is none. The content stays
// until a Prune.
func (s *Store) DeleteTag(ref string) error {
	if _, err := s.Tag(ref); err != nil {
		return err
	}
	p, err := s.tagPath(ref)
	if err != nil {
		return err
	}
	return removeFile(p)
}

// Tags returns all tags, sorted by reference.
func (s *Store) Tags() ([]Tag, error) {
	var tags []Tag
	err := eachFile(s.path(dirTags), func(p string, _ fs.FileInfo) error {
		t, err := readTag(p)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		tags = append(tags, t)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list tags: %w", err)
	}
	sort.Slice(tags, func(i, j int) bool { return tags[i].Ref < tags[j].Ref })
	return tags, nil
}

func (s *Store) tagPath(ref string) (string, error) {
	if ref == "" || len(ref) > MaxKey {
		return "", fmt.Errorf("tag %q: a reference has 1 to %d bytes", clip(ref), MaxKey)
	}
	return s.path(dirTags, hashName(ref)), nil
}

func readTag(p string) (Tag, error) {
	ref, b, err := readRecord(p)
	if err != nil {
		return Tag{}, err
	}
	var r tagRecord
	if json.Unmarshal(b, &r) != nil {
		return Tag{}, fs.ErrNotExist
	}
	if _, err := checkDigest(r.Descriptor.Digest); err != nil {
		return Tag{}, fs.ErrNotExist
	}
	return Tag{Ref: ref, Descriptor: r.Descriptor, Time: r.Time}, nil
}

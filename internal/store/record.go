package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a record.
const (
	MaxRecord = 8 << 20
	MaxKey    = 4 << 10
)

// LinkKind begins the kind of records that tell a second form of something: the
// key is a digest, the content mentions others. They keep nothing on their
// own: while the key's content is needed, what they mention is needed
// too, and when it goes they go.
const LinkKind = "link-"

// A record on disk: magic, length of key, length of content, key, content,
// SHA-256 of all of that. What does not read so is not there.
const recordMagic = "KILNREC1"

const recordFrame = len(recordMagic) + 8

// PutRecord stores b under a kind (lower-case letters, digits, "-", ".", "_": a
// constant of the program) and any key. A later one replaces it.
//
// A record keeps alive what it mentions: every blob and layer whose digest
// is written in it, anywhere and in any format, as "sha256:…"; for as long as
// Prune is told to keep records.
func (s *Store) PutRecord(kind, key string, b []byte) error {
	p, err := s.recordPath(kind, key)
	if err != nil {
		return err
	}
	if err := s.writeRecord(p, key, b); err != nil {
		return s.writing("record", err)
	}
	return nil
}

// GetRecord returns a record, or fs.ErrNotExist: also for one that is damaged.
func (s *Store) GetRecord(kind, key string) ([]byte, error) {
	p, err := s.recordPath(kind, key)
	if err != nil {
		return nil, err
	}
	if _, err := s.touch(p); err != nil {
		return nil, fmt.Errorf("record %s %q: %w", kind, clip(key), err)
	}
	return s.PeekRecord(kind, key)
}

// PeekRecord is GetRecord for those who only look: it does not count as a use.
func (s *Store) PeekRecord(kind, key string) ([]byte, error) {
	p, err := s.recordPath(kind, key)
	if err != nil {
		return nil, err
	}
	k, b, err := readRecord(p)
	if err == nil && k != key {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("record %s %q: %w", kind, clip(key), err)
	}
	return b, nil
}

// DeleteRecord removes a record; there need not be one.
func (s *Store) DeleteRecord(kind, key string) error {
	p, err := s.recordPath(kind, key)
	if err != nil {
		return err
	}
	return removeFile(p)
}

// Records calls fn for every record of a kind with the time when it was last
// used, in no particular order. Records that come or go meanwhile may be missed.
func (s *Store) Records(kind string, fn func(key string, used time.Time) error) error {
	if err := checkKind(kind); err != nil {
		return err
	}
	return eachFile(s.path(dirRecords, kind), func(p string, fi fs.FileInfo) error {
		key, _, err := readRecord(p)
		if err != nil {
			return nil
		}
		return fn(key, fi.ModTime())
	})
}

func (s *Store) recordPath(kind, key string) (string, error) {
	if err := checkKind(kind); err != nil {
		return "", err
	}
	if len(key) > MaxKey {
		return "", fmt.Errorf("record %s %q: the key has %d bytes, and %d are allowed", kind, clip(key), len(key), MaxKey)
	}
	return s.path(dirRecords, kind, hashName(key)), nil
}

func checkKind(kind string) error {
	const allowed = "abcdefghijklmnopqrstuvwxyz0123456789-._"
	if kind == "" || len(kind) > 64 || kind[0] == '.' || strings.Trim(kind, allowed) != "" {
		return fmt.Errorf("record kind %q: want lower-case letters, digits, - . and _", clip(kind))
	}
	return nil
}

// hashName is a file name for any string.
func hashName(key string) string {
	h := sha256.Sum256([]byte(key))
	return hex.EncodeToString(h[:])
}

func (s *Store) writeRecord(path, key string, b []byte) error {
	if len(b) > MaxRecord {
		return fmt.Errorf("%d bytes are more than the %d that are allowed", len(b), MaxRecord)
	}
	f, err := s.tempFile("record")
	if err != nil {
		return err
	}
	defer f.discard()
	buf := make([]byte, 0, recordFrame+len(key)+len(b)+sha256.Size)
	buf = append(buf, recordMagic...)
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(key)))
	buf = binary.BigEndian.AppendUint32(buf, uint32(len(b)))
	buf = append(buf, key...)
	buf = append(buf, b...)
	sum := sha256.Sum256(buf)
	if _, err := f.Write(append(buf, sum[:]...)); err != nil {
		return err
	}
	return f.commit(path)
}

// readRecord returns fs.ErrNotExist for whatever is not a whole record.
func readRecord(path string) (key string, b []byte, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	const most = int64(recordFrame + MaxKey + MaxRecord + sha256.Size)
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return "", nil, err
	}
	return parseRecord(raw)
}

func parseRecord(raw []byte) (key string, b []byte, err error) {
	if len(raw) < recordFrame+sha256.Size || string(raw[:len(recordMagic)]) != recordMagic {
		return "", nil, fs.ErrNotExist
	}
	body, sum := raw[:len(raw)-sha256.Size], raw[len(raw)-sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return "", nil, fs.ErrNotExist
	}
	nk := int64(binary.BigEndian.Uint32(raw[len(recordMagic):]))
	nb := int64(binary.BigEndian.Uint32(raw[len(recordMagic)+4:]))
	body = body[recordFrame:]
	if nk > MaxKey || nb > MaxRecord || nk+nb != int64(len(body)) {
		return "", nil, fs.ErrNotExist
	}
	return string(body[:nk]), body[nk:], nil
}

func removeFile(p string) error {
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// eachFile calls fn for every regular file below dir, and goes on when some
// vanish.
func eachFile(dir string, fn func(path string, fi fs.FileInfo) error) error {
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		return fn(p, fi)
	})
}

// Package secret knows the secrets that a user passes to a build: from files and from
// the environment. Values are read when a step asks for them, and kept nowhere.
package secret

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// MaxSize bounds the value of a secret in bytes, as BuildKit does.
const MaxSize = 500 << 10

// Source says where a secret comes from.
type Source struct {
	ID   string
	File string // path
	Env  string // name of a variable; it goes before File
}

// Parse reads a --secret option as docker does: id=ID[,src=FILE][,env=NAME][,type=file|env].
func Parse(s string) (Source, error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return Source{}, err
	}
	var src Source
	kind := ""
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		if !ok {
			return Source{}, errors.New("it is not a list of KEY=VALUE")
		}
		switch strings.ToLower(k) {
		case "id":
			src.ID = v
		case "src", "source":
			src.File = v
		case "env":
			src.Env = v
		case "type":
			kind = v
			if kind != "file" && kind != "env" {
				return Source{}, fmt.Errorf("type %q is neither file nor env", v)
			}
		default:
			return Source{}, fmt.Errorf("the key %q is not known", k)
		}
	}
	if src.ID == "" {
		return Source{}, errors.New("it has no id")
	}
	if kind == "env" && src.Env == "" {
		src.Env, src.File = src.File, ""
	}
	return src, nil
}

// Secrets are the secrets of a build. Safe for concurrent use.
type Secrets struct {
	sources map[string]Source
	lookup  func(name string) (value string, ok bool)
}

// Open takes the sources, of which later ones replace earlier ones with their ID. lookup knows the
// environment. A file must be there and not too large; a source that names neither file nor
// variable is the variable of its ID's name, or else the file.
func Open(sources []Source, lookup func(name string) (string, bool)) (*Secrets, error) {
	s := &Secrets{sources: map[string]Source{}, lookup: lookup}
	for _, src := range sources {
		if src.Env == "" && src.File == "" {
			if _, ok := lookup(src.ID); ok {
				src.Env = src.ID
			} else {
				src.File = src.ID
			}
		}
		if src.Env == "" {
			fi, err := os.Stat(src.File)
			if err == nil && fi.Size() > MaxSize {
				err = tooLarge(fi.Size())
			}
			if err != nil {
				return nil, fmt.Errorf("secret %q: %w", src.ID, err)
			}
		}
		s.sources[src.ID] = src
	}
	return s, nil
}

func tooLarge(size int64) error {
	return fmt.Errorf("it has %d bytes: more than %d are refused", size, MaxSize)
}

// Secret returns the value of a secret. The error is fs.ErrNotExist if none of that ID was passed.
func (s *Secrets) Secret(_ context.Context, id string) ([]byte, error) {
	src, ok := s.sources[id]
	if !ok {
		return nil, fmt.Errorf("secret %q: %w", id, fs.ErrNotExist)
	}
	if src.Env != "" {
		v, _ := s.lookup(src.Env) // a variable that is not set is empty, as in docker
		if len(v) > MaxSize {
			return nil, tooLarge(int64(len(v)))
		}
		return []byte(v), nil
	}
	v, err := read(src.File)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%q is gone", src.File) // it was passed, so that it is not missing
	}
	return v, err
}

func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	v, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err == nil && len(v) > MaxSize {
		err = tooLarge(int64(len(v)))
	}
	return v, err
}

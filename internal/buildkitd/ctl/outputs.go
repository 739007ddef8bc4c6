package ctl

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"golang.org/x/term"

	"github.com/kiln-build/kiln/internal/diag"
)

// outputs are the files and directories that the server sends.
type outputs struct {
	targets []filesync.FSSyncTarget
	files   []*file
}

// offer lets the server send them.
func (o *outputs) offer(s *session.Session) {
	if len(o.targets) > 0 {
		s.Allow(filesync.NewFSSyncTarget(o.targets...))
	}
}

// keep gives files their names, once the build has succeeded.
func (o *outputs) keep() error {
	var errs []error
	for _, f := range o.files {
		errs = append(errs, f.keep())
	}
	return errors.Join(errs...)
}

// discard removes what has not been kept.
func (o *outputs) discard() {
	for _, f := range o.files {
		f.discard()
	}
}

// outputs adds exporters to req, and says where what they send is to go.
func (r *Request) outputs(req *controlapi.SolveRequest) (*outputs, error) {
	o := &outputs{}
	for i, e := range r.Outputs {
		attrs := e.Attrs
		switch dest := attrs["dest"]; e.Type {
		case "local":
			delete(attrs, "dest")
			if dest == "" {
				return nil, diag.New(diag.ExitUsage, "--output type=local needs dest=DIR")
			}
			if attrs["mode"] == "delete" {
				o.targets = append(o.targets, filesync.WithFSSyncDirDelete(i, dest))
			} else {
				o.targets = append(o.targets, filesync.WithFSSyncDir(i, dest))
			}
		case "tar", "oci", "docker":
			delete(attrs, "dest")
			if tar, err := strconv.ParseBool(attrs["tar"]); err == nil && !tar {
				return nil, diag.New(diag.ExitUsage, "--output type=%s,tar=false is not supported with a server", e.Type).
					WithHint("Have an archive written, and unpack it: type=%s,dest=FILE.", e.Type)
			}
			f := &file{dest: dest, stdout: r.Stdout}
			if f.toStdout() {
				if err := o.claimStdout(r.Stdout, e.Type); err != nil {
					return nil, err
				}
			}
			o.files = append(o.files, f)
			o.targets = append(o.targets, filesync.WithFSSync(i, f.open))
		default:
			if dest != "" {
				return nil, diag.New(diag.ExitUsage, "--output type=%s has no dest", e.Type)
			}
		}
		req.Exporters = append(req.Exporters, &controlapi.Exporter{Type: e.Type, Attrs: attrs})
	}
	if len(req.Exporters) > 0 { // for servers from before there could be several
		first := req.Exporters[0]
		req.ExporterDeprecated, req.ExporterAttrsDeprecated = first.Type, first.Attrs
	}
	return o, nil
}

// claimStdout refuses what would make standard output unreadable.
func (o *outputs) claimStdout(w io.Writer, kind string) error {
	if slices.ContainsFunc(o.files, (*file).toStdout) {
		return diag.New(diag.ExitUsage, "only one output can go to standard output")
	}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return diag.New(diag.ExitUsage, "--output type=%s would write an archive to the terminal", kind).
			WithHint("Name a file with dest=FILE, or redirect standard output.")
	}
	return nil
}

// file is an archive that the server sends. It appears when the build has succeeded.
type file struct {
	dest   string // empty or "-": standard output
	stdout io.Writer
	tmp    string // what is written meanwhile; empty: dest itself, which is no regular file
}

func (f *file) toStdout() bool { return f.dest == "" || f.dest == "-" }

// open is a filesync.FileOutputFunc.
func (f *file) open(map[string]string) (io.WriteCloser, error) {
	if f.toStdout() {
		return stays{f.stdout}, nil
	}
	fi, err := os.Stat(f.dest)
	switch {
	case err == nil && fi.IsDir():
		return nil, &fs.PathError{Op: "write", Path: f.dest, Err: errors.New("it is a directory")}
	case err == nil && !fi.Mode().IsRegular():
		return os.OpenFile(f.dest, os.O_WRONLY, 0)
	}
	tmp, err := os.CreateTemp(filepath.Dir(f.dest), ".kiln-*")
	if err != nil {
		return nil, err
	}
	f.tmp = tmp.Name()
	return tmp, nil
}

func (f *file) keep() error {
	if f.tmp == "" {
		return nil
	}
	if err := errors.Join(os.Chmod(f.tmp, 0o644), os.Rename(f.tmp, f.dest)); err != nil {
		return diag.New(diag.ExitFailure, "write output: %w", err)
	}
	f.tmp = ""
	return nil
}

func (f *file) discard() {
	if f.tmp != "" {
		_ = os.Remove(f.tmp) // there is an error to be told already
	}
}

// stays is open after it was closed.
type stays struct{ io.Writer }

// Close implements io.Closer.
func (stays) Close() error { return nil }

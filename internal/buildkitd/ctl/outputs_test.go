package ctl

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/kiln-build/kiln/internal/diag"
)

func entries(dests ...string) (all []Entry) {
	for _, d := range dests {
		all = append(all, Entry{Type: "oci", Attrs: map[string]string{"dest": d}})
	}
	return all
}

// TestArchives: an archive is there when its build has succeeded, and not before.
func TestArchives(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a.tar")
	for _, keep := range []bool{false, true} {
		r := &Request{Outputs: entries(name)}
		o, err := r.outputs(&controlapi.SolveRequest{})
		if err != nil {
			t.Fatal(err)
		}
		w, err := o.files[0].open(nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, "x"); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(name); err == nil {
			t.Error("the archive is there before the build has ended")
		}
		if keep {
			if err := o.keep(); err != nil {
				t.Fatal(err)
			}
		}
		o.discard()
		b, err := os.ReadFile(name)
		if kept := err == nil && string(b) == "x"; kept != keep {
			t.Errorf("kept: %v, want %v", kept, keep)
		}
		left, err := os.ReadDir(filepath.Dir(name))
		if want := map[bool]int{true: 1}[keep]; err != nil || len(left) != want {
			t.Errorf("%v (%v), want %d files", left, err, want)
		}
	}
}

func TestStandardOutput(t *testing.T) {
	var b bytes.Buffer
	r := &Request{Outputs: entries("-"), Stdout: &b}
	req := &controlapi.SolveRequest{}
	o, err := r.outputs(req)
	if err != nil {
		t.Fatal(err)
	}
	w, err := o.files[0].open(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "x"); err != nil || b.String() != "x" {
		t.Errorf("%q, %v", b.String(), err)
	}
	if len(req.Exporters) != 1 || req.Exporters[0].Attrs["dest"] != "" {
		t.Errorf("the server is asked for %v", req.Exporters)
	}
	for want, es := range map[string][]Entry{
		"only one output":  entries("-", ""),
		"needs dest=DIR":   {{Type: "local", Attrs: map[string]string{}}},
		"has no dest":      {{Type: "image", Attrs: map[string]string{"dest": "x"}}},
		"is not supported": {{Type: "oci", Attrs: map[string]string{"dest": "x", "tar": "false"}}},
	} {
		r := &Request{Outputs: es, Stdout: &b}
		if _, err := r.outputs(&controlapi.SolveRequest{}); diag.ExitCode(err) != diag.ExitUsage || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", es, err, want)
		}
	}
}

// TestTLSDir: files by either of their names.
func TestTLSDir(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"ca.crt", "cert.pem", "tls.key"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := Address{Dir: dir}
	if err := a.fromDir(); err != nil || a.CA != dir+"/ca.crt" || a.Cert != dir+"/cert.pem" || a.Key != dir+"/tls.key" {
		t.Errorf("%+v, %v", a, err)
	}
	for _, a := range []Address{{Addr: "unix:///x", Dir: t.TempDir()}, {Addr: "unix:///x", Dir: dir, CA: "y"}, {Addr: "docker-container://x"}, {Addr: "x"}} {
		if _, err := Dial(t.Context(), a); diag.ExitCode(err) != diag.ExitUsage {
			t.Errorf("%+v: %v", a, err)
		}
	}
}

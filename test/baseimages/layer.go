package baseimages

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the time of everything that has no better one.
func epoch() time.Time { return time.Unix(1767225600, 0).UTC() }

// layerFile is a tar being written; all owners are root.
type layerFile struct {
	f    *os.File
	w    *tar.Writer
	made map[string]bool
}

func newLayer(tmp string) (*layerFile, error) {
	f, err := os.CreateTemp(tmp, "layer-*.tar")
	if err != nil {
		return nil, err
	}
	return &layerFile{f: f, w: tar.NewWriter(f), made: map[string]bool{".": true, "/": true}}, nil
}

// dir adds a directory and, with mode 0755, the parents that this layer lacks.
func (l *layerFile) dir(name string, mode int64) error {
	if l.made[name] {
		return nil
	}
	if err := l.dir(path.Dir(name), 0o755); err != nil {
		return err
	}
	l.made[name] = true
	return l.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: epoch()})
}

func (l *layerFile) file(name string, mode int64, data []byte) error {
	if err := l.dir(path.Dir(name), 0o755); err != nil {
		return err
	}
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: epoch()}
	if err := l.w.WriteHeader(h); err != nil {
		return err
	}
	_, err := l.w.Write(data)
	return err
}

func (l *layerFile) link(typ byte, name, target string) error {
	if err := l.dir(path.Dir(name), 0o755); err != nil {
		return err
	}
	return l.w.WriteHeader(&tar.Header{Typeflag: typ, Name: name, Linkname: target, Mode: 0o777, ModTime: epoch()})
}

// tree adds the files below a directory of this machine as dst, but for those that skip names.
func (l *layerFile) tree(dst, src string, skip func(rel string) bool) error {
	return filepath.WalkDir(src, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, p)
		if err != nil {
			return err
		}
		if rel != "." && skip(rel) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		return l.copyIn(path.Join(dst, rel), p)
	})
}

func (l *layerFile) copyIn(name, src string) error {
	fi, err := os.Lstat(src)
	if err != nil {
		return err
	}
	switch fi.Mode().Type() {
	case fs.ModeDir:
		return l.dir(name, int64(fi.Mode().Perm()))
	case fs.ModeSymlink:
		t, err := os.Readlink(src)
		if err != nil {
			return err
		}
		return l.link(tar.TypeSymlink, name, t)
	case 0:
		data, err := os.ReadFile(src)
		if err != nil {
			return err
		}
		return l.file(name, int64(fi.Mode().Perm()), data)
	}
	return fmt.Errorf("add %q to a layer: not a file, directory or link", src)
}

// done closes the tar and returns it as a layer.
func (l *layerFile) done() (v1.Layer, error) {
	if err := l.w.Close(); err != nil {
		return nil, err
	}
	if err := l.f.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromFile(l.f.Name(), tarball.WithCompressionLevel(gzip.BestSpeed),
		tarball.WithMediaType(types.OCILayer))
}

// image puts a layer and a config on top of base.
func image(base v1.Image, l v1.Layer, createdBy string, edit func(*v1.Config)) (v1.Image, error) {
	base = mutate.ConfigMediaType(mutate.MediaType(base, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.Append(base, mutate.Addendum{
		Layer:     l,
		MediaType: types.OCILayer,
		History:   v1.History{Created: v1.Time{Time: epoch()}, CreatedBy: createdBy},
	})
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.Created = v1.Time{Time: epoch()}
	cf.OS = "linux"
	cf.Architecture = goarch()
	edit(&cf.Config)
	return mutate.ConfigFile(img, cf)
}

// readFile reads one regular file of an image's file system.
func readFile(img v1.Image, name string) ([]byte, error) {
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	for i := len(layers) - 1; i >= 0; i-- {
		rc, err := layers[i].Uncompressed()
		if err != nil {
			return nil, err
		}
		b, err := findInTar(rc, name)
		rc.Close()
		if err != nil || b != nil {
			return b, err
		}
	}
	return nil, fmt.Errorf("read %q of an image: %w", name, fs.ErrNotExist)
}

func findInTar(r io.Reader, name string) ([]byte, error) {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if path.Clean(h.Name) == name && h.Typeflag == tar.TypeReg {
			var b bytes.Buffer
			_, err := io.Copy(&b, t)
			return b.Bytes(), err
		}
	}
}

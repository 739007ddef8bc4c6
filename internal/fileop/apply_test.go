package fileop

import (
	"archive/tar"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// readLayer reads a layer tar into a raw layer, strictly: every parent must come
// before its children, names must be in order of a walk, no entry twice.
func readLayer(r io.Reader) (*memtree.Tree, []string, error) {
	files := map[string]memtree.File{}
	var names []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return memtree.New(files), names, nil
		}
		if err != nil {
			return nil, nil, err
		}
		names = append(names, h.Name)
		p := path.Clean(h.Name)
		if d := path.Dir(p); d != "." && files[d].Mode&tree.ModeType != tree.ModeDir {
			return nil, nil, fmt.Errorf("entry %q before its directory", h.Name)
		}
		dir, base := path.Split(p)
		if base == ".wh..wh..opq" {
			d := files[path.Clean(dir)]
			if d.Xattr == nil {
				d.Xattr = map[string]string{}
			}
			d.Xattr[tree.XattrOpaque] = "y"
			files[path.Clean(dir)] = d
			continue
		}
		if b, ok := strings.CutPrefix(base, ".wh."); ok {
			files[path.Join(dir, b)] = memtree.Whiteout()
			continue
		}
		if _, ok := files[p]; ok {
			return nil, nil, fmt.Errorf("entry %q twice", h.Name)
		}
		f := memtree.File{
			Mode: uint32(h.Mode), NoPerm: h.Mode == 0, UID: uint32(h.Uid), GID: uint32(h.Gid), MTime: h.ModTime,
			Link: h.Linkname, Major: uint32(h.Devmajor), Minor: uint32(h.Devminor),
		}
		switch h.Typeflag {
		case tar.TypeReg:
			b, err := io.ReadAll(tr)
			if err != nil {
				return nil, nil, err
			}
			f.Mode, f.Data = f.Mode|tree.ModeRegular, string(b)
		case tar.TypeDir:
			f.Mode |= tree.ModeDir
		case tar.TypeSymlink:
			f.Mode |= tree.ModeSymlink
		case tar.TypeFifo:
			f.Mode |= tree.ModeFIFO
		case tar.TypeChar:
			f.Mode |= tree.ModeChar
		case tar.TypeLink:
			if l, ok := files[h.Linkname]; !ok || l.Mode&tree.ModeType == tree.ModeDir {
				return nil, nil, fmt.Errorf("hard link %q to %q, which is no file before it", h.Name, h.Linkname)
			}
			f = memtree.File{HardLink: h.Linkname}
		}
		for k, v := range h.PAXRecords {
			if k, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				if f.Xattr == nil {
					f.Xattr = map[string]string{}
				}
				f.Xattr[k] = v
			}
		}
		files[p] = f
	}
}

// sameAfterApply applies a layer tar to base: that must give want, up to links
// between changed and unchanged files and times of directories that are no change.
func sameAfterApply(r io.Reader, want tree.Tree, base tree.Tree) error {
	l, names, err := readLayer(r)
	if err != nil {
		return err
	}
	got := rootfs.New(base, l)
	w, err := listing(want)
	if err != nil {
		return err
	}
	g, err := listing(got)
	if err != nil {
		return err
	}
	// The root is no entry of a layer.
	w[0], g[0] = "", ""
	if !slices.Equal(w, g) {
		return fmt.Errorf("layer %q applied gives\n  %s\nwant\n  %s", names, strings.Join(g, "\n  "), strings.Join(w, "\n  "))
	}
	return nil
}

func listing(t tree.Tree) ([]string, error) {
	var out []string
	links := map[uint64]string{}
	err := tree.Walk(t, ".", func(p string, n tree.Node) error {
		if n.IsDir() {
			n.MTime = time.Unix(0, 0)
		}
		s, err := describeNode(t, p, n, links, time.Now())
		out = append(out, s)
		return err
	})
	return out, err
}

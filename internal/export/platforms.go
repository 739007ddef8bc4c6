package export

import (
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
)

// PlatformTree is the root file system of one platform's image.
type PlatformTree struct {
	ID       string // "linux/arm64": what its directory is called by, linux_arm64; empty: the platform's name
	Platform ocispec.Platform
	Tree     tree.Tree
}

// SplitPlatforms is one tree with a directory for each platform: "linux_arm64".
// The directories are of the time at.
func SplitPlatforms(ts []PlatformTree, at time.Time) tree.Tree {
	var all []tree.Tree
	for _, t := range ts {
		all = append(all, &below{dir: platformDir(t), tree: t.Tree, time: at})
	}
	return rootfs.New(all...)
}

// platformDir is one name, whatever a client calls its platforms.
func platformDir(t PlatformTree) string {
	id := t.ID
	if id == "" {
		id = platforms.FormatAll(platforms.Normalize(t.Platform))
	}
	id = strings.NewReplacer("/", "_", `\`, "_", ":", "_").Replace(id)
	if id == "." || id == ".." {
		return strings.Repeat("_", len(id))
	}
	return id
}

// MergePlatforms is one tree with the files of all. Two platforms with a file of
// one name are an error.
func MergePlatforms(ts []PlatformTree) (tree.Tree, error) {
	of := map[string]string{}
	var all []tree.Tree
	for _, t := range ts {
		name := platforms.FormatAll(t.Platform)
		err := tree.Walk(t.Tree, ".", func(p string, n tree.Node) error {
			if n.IsDir() {
				return nil
			}
			if other, ok := of[p]; ok {
				return diag.New(diag.ExitUsage, "cannot overwrite %s from %s with %s when split option is disabled", p, other, name).
					WithHint("Leave platform-split=false out: each platform then has a directory of its own.")
			}
			of[p] = name
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("put the files of several platforms together: %w", err)
		}
		all = append(all, t.Tree)
	}
	return rootfs.New(all...), nil
}

// below is a tree that has another one in a directory.
type below struct {
	dir  string
	tree tree.Tree
	time time.Time
}

// inside is the path in the tree; false if it is outside of the directory.
func (b *below) inside(p string) (string, bool) {
	if p == b.dir {
		return ".", true
	}
	return strings.CutPrefix(p, b.dir+"/")
}

func (b *below) node() tree.Node { return tree.Node{Mode: tree.ModeDir | 0o755, MTime: b.time} }

// Lstat implements tree.Tree.
func (b *below) Lstat(p string) (tree.Node, error) {
	if p == "." || p == b.dir {
		return b.node(), nil
	}
	in, ok := b.inside(p)
	if !ok {
		return tree.Node{}, missing("lstat", p)
	}
	return b.tree.Lstat(in)
}

// ReadDir implements tree.Tree.
func (b *below) ReadDir(p string) ([]tree.Entry, error) {
	if p == "." {
		return []tree.Entry{{Name: b.dir, Node: b.node()}}, nil
	}
	in, ok := b.inside(p)
	if !ok {
		return nil, missing("readdir", p)
	}
	return b.tree.ReadDir(in)
}

// Readlink implements tree.Tree.
func (b *below) Readlink(p string) (string, error) {
	in, ok := b.inside(p)
	if !ok {
		return "", missing("readlink", p)
	}
	return b.tree.Readlink(in)
}

// Open implements tree.Tree.
func (b *below) Open(p string) (io.ReadCloser, error) {
	in, ok := b.inside(p)
	if !ok {
		return nil, missing("open", p)
	}
	return b.tree.Open(in)
}

func missing(op, p string) error { return &fs.PathError{Op: op, Path: p, Err: fs.ErrNotExist} }

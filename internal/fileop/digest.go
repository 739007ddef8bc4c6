package fileop

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"maps"
	"path"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// digestVersion is part of every digest: to be changed with what is hashed.
const digestVersion = "kiln.fileop.digest.v1"

// Digest identifies all that the given copies would take from t, for a cache key: names,
// types, permissions, owners, link targets, extended attributes and content of
// what the sources, wildcards and patterns select, found by the code that copies.
// Times are no part of it, so that a touch does not change it, and nor is what is
// not selected. Of an action only the fields that say what is selected count; where it
// goes, and with which owner and mode, belongs to the key of the action.
//
// A source that is missing is an error, in BuildKit's words, for which
// errors.Is(err, fs.ErrNotExist).
func Digest(ctx context.Context, t tree.Tree, actions ...CopyAction) (digest.Digest, error) {
	if t == nil {
		t = rootfs.New()
	}
	h := framed{sha256.New()}
	h.str(digestVersion)
	h.num(uint64(len(actions)))
	for _, a := range actions {
		if err := digestAction(ctx, h, t, a); err != nil {
			return "", fmt.Errorf("failed to calculate checksum: %w", err)
		}
	}
	return digest.NewDigest(digest.SHA256, h.Hash), nil
}

func digestAction(ctx context.Context, h framed, t tree.Tree, a CopyAction) error {
	matches, err := sources(t, a)
	if err != nil {
		return err
	}
	req := &required{paths: slices.Clone(a.RequiredPaths)}
	a.ModeStr, a.Mode, a.Timestamp = "", nil, nil
	h.num(uint64(len(matches)))
	for i, s := range matches {
		h.str("copy")
		if err := digestSource(ctx, h, t, s, a, req, i); err != nil {
			return err
		}
		if a.AttemptUnpackDockerCompatibility && !a.FollowSymlink {
			// Whether it is an archive is seen through a link in any case.
			h.str("follow")
			b := a
			b.FollowSymlink = true
			err := digestSource(ctx, h, t, s, b, req, i)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	if len(a.IncludePatterns) > 0 && len(req.paths) > 0 {
		return &notFoundError{req.paths[0]}
	}
	return nil
}

// digestSource copies one source to nowhere, and hashes what that gives.
func digestSource(ctx context.Context, h framed, t tree.Tree, s string, a CopyAction, req *required, i int) error {
	c := New(nil, Options{Now: time.Unix(0, 0)})
	dir := strconv.Itoa(i)
	if err := c.copyOne(ctx, t, s, "/"+dir+"/", nil, a, req); err != nil {
		return err
	}
	if !a.DirCopyContents {
		// The metadata of a directory that is copied itself, were it the root.
		p, err := rootfs.ResolveNew(t, path.Join("/", s), a.FollowSymlink)
		if err != nil {
			return err
		}
		n, err := t.Lstat(p)
		if err != nil {
			return err
		}
		if n.IsDir() {
			h.node(n, "")
		}
	}
	root, err := c.dir(dir)
	if err != nil {
		return err
	}
	contents, err := digestContents(ctx, root)
	if err != nil {
		return err
	}
	h.entries(root, contents)
	return nil
}

// digestContents digests all files' content, several at a time.
func digestContents(ctx context.Context, root *inode) (map[*inode]digest.Digest, error) {
	out := map[*inode]digest.Digest{}
	var todo []*inode
	for i := range root.files() {
		if _, ok := out[i]; !ok {
			out[i] = ""
			todo = append(todo, i)
		}
	}
	sums := make([]digest.Digest, len(todo))
	g, gctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range min(len(todo), max(2, runtime.GOMAXPROCS(0))) {
		g.Go(func() (err error) {
			buf := make([]byte, 64<<10)
			for k := next.Add(1) - 1; k < int64(len(todo)); k = next.Add(1) - 1 {
				if sums[k], err = todo[k].contentDigest(gctx, buf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for k, i := range todo {
		out[i] = sums[k]
	}
	return out, nil
}

// files yields the regular files below i.
func (i *inode) files() func(yield func(*inode) bool) {
	return func(yield func(*inode) bool) { i.eachFile(yield) }
}

func (i *inode) eachFile(yield func(*inode) bool) bool {
	for _, k := range i.kids {
		if k.node.IsRegular() && !yield(k) || !k.eachFile(yield) {
			return false
		}
	}
	return true
}

func (i *inode) contentDigest(ctx context.Context, buf []byte) (digest.Digest, error) {
	if d, err := i.content.digest(); err == nil {
		return d, nil
	} else if !errors.Is(err, errors.ErrUnsupported) {
		return "", err
	}
	r, err := i.content.open()
	if err != nil {
		return "", err
	}
	defer r.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(h, cancellable{ctx, r}, buf); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// cancellable is a reader that ends with its context. It hides WriterTo, which
// might not ask.
type cancellable struct {
	ctx context.Context //nolint:containedctx // lives for one call
	r   io.Reader
}

func (c cancellable) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// framed hashes values such that no two sequences of them look alike.
type framed struct{ hash.Hash }

func (h framed) num(n uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	_, _ = h.Write(b[:])
}

func (h framed) str(s string) {
	h.num(uint64(len(s)))
	_, _ = io.WriteString(h, s)
}

// node hashes all of n that counts.
func (h framed) node(n tree.Node, target string) {
	mode := n.Mode
	if n.IsSymlink() {
		mode = tree.ModeSymlink // permissions of a link mean nothing
	}
	for _, v := range []uint32{mode, n.UID, n.GID, n.Major, n.Minor} {
		h.num(uint64(v))
	}
	h.str(target)
	x := copiedXattrs(n.Xattr)
	h.num(uint64(len(x)))
	for _, k := range slices.Sorted(maps.Keys(x)) {
		h.str(k)
		h.str(x[k])
	}
}

// entries hashes what is below the directory i.
func (h framed) entries(i *inode, contents map[*inode]digest.Digest) {
	h.num(uint64(len(i.kids)))
	for _, name := range slices.Sorted(maps.Keys(i.kids)) {
		k := i.kids[name]
		h.str(name)
		h.node(k.node, k.target)
		if k.node.IsRegular() {
			h.num(uint64(k.node.Size))
			h.str(string(contents[k]))
		}
		if k.node.IsDir() {
			h.entries(k, contents)
		}
	}
}

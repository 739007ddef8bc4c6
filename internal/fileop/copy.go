package fileop

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kiln-build/kiln/internal/rootfs"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/moby/patternmatcher"
	mode "github.com/tonistiigi/dchapes-mode"
)

const defaultDirMode = 0o755

// notFoundError says that a path which a COPY names is missing, in BuildKit's words.
type notFoundError struct{ path string }

func (e *notFoundError) Error() string { return fmt.Sprintf("%q: not found", e.path) }

func (e *notFoundError) Is(target error) bool { return target == fs.ErrNotExist }

// Copy copies from src. Nothing of src is read before WriteTar or Open, but for
// archives to unpack; src must stay as it is until then.
func (c *Changes) Copy(ctx context.Context, src tree.Tree, a CopyAction) error {
	if src == nil {
		src = rootfs.New()
	}
	if src == tree.Tree(c) {
		before := c.Clone()
		// Its scratch file is c's, which stays.
		defer before.Close()
		src = before
	}
	own, err := resolveOwner(a.Owner)
	if err != nil {
		return err
	}
	dest := cleanPath(a.Dest)
	if !a.CreateDestPath {
		p, err := rootfs.ResolveNew(c, path.Join("/", a.Dest), true)
		if err != nil {
			return err
		}
		if _, err := c.lstat(path.Dir(p)); err != nil {
			return fmt.Errorf("failed to stat %s: %w", a.Dest, err)
		}
	}
	matches, err := sources(src, a)
	if err != nil {
		return err
	}
	required := &required{paths: slices.Clone(a.RequiredPaths)}
	for _, s := range matches {
		if a.AttemptUnpackDockerCompatibility {
			done, err := c.unpack(ctx, src, s, dest, own, a.Timestamp)
			if err != nil {
				return fmt.Errorf("unpack %q: %w", s, err)
			}
			if done {
				continue
			}
		}
		if err := c.copyOne(ctx, src, s, dest, own, a, required); err != nil {
			return err
		}
	}
	if len(a.IncludePatterns) > 0 && len(required.paths) > 0 {
		return &notFoundError{required.paths[0]}
	}
	return nil
}

// sources resolves the wildcards of a.Src.
func sources(src tree.Tree, a CopyAction) ([]string, error) {
	p := cleanPath(a.Src)
	if !a.AllowWildcard {
		return []string{p}, nil
	}
	m, err := resolveWildcards(src, p, a.FollowSymlink)
	if err != nil {
		return nil, err
	}
	if len(m) == 0 && !a.AllowEmptyWildcard {
		return nil, fmt.Errorf("%s not found: %w", p, fs.ErrNotExist)
	}
	return m, nil
}

// required are the paths that must be copied and were not yet.
type required struct{ paths []string }

func (r *required) saw(p string) {
	if len(r.paths) > 0 {
		r.paths = slices.DeleteFunc(r.paths, func(q string) bool { return strings.HasPrefix(p, q) })
	}
}

// copier copies one source, which may be a directory.
type copier struct {
	c        *Changes
	src      tree.Tree
	from     string // the source as it was named
	own      *owner
	utime    *time.Time
	mode     *uint32
	modeSet  *mode.Set
	links    map[uint64]string // inode of the source → its first name in c
	include  *patternmatcher.PatternMatcher
	exclude  *patternmatcher.PatternMatcher
	parents  []parentDir
	replace  bool
	required *required
}

// parentDir is a directory on the way down; it is made when the first thing in
// it is copied, as not everything may be.
type parentDir struct {
	node   tree.Node
	dst    string
	copied bool
}

// copyOne is fsutil's copy.Copy.
func (c *Changes) copyOne(ctx context.Context, src tree.Tree, s, dest string, own *owner, a CopyAction, req *required) error {
	k, err := newCopier(c, src, s, own, a, req)
	if err != nil {
		return err
	}
	ensure := dest
	if d, f := path.Split(dest); f != "" && f != "." {
		ensure = d
	}
	p, err := rootfs.ResolveNew(c, ensure, true)
	if err != nil {
		return err
	}
	created, err := c.mkdirAll(p, k.dirMode(), own, a.Timestamp)
	if err != nil {
		return err
	}
	defer c.fixParents(created, a.Timestamp)

	dst, err := rootfs.ResolveNew(c, path.Clean(dest), true)
	if err != nil {
		return err
	}
	from, err := rootfs.ResolveNew(src, path.Join("/", s), a.FollowSymlink)
	if err != nil {
		return err
	}
	n, err := src.Lstat(from)
	if errors.Is(err, fs.ErrNotExist) {
		return &notFoundError{path.Join("/", s)}
	}
	if err != nil {
		return err
	}
	dst, created, err = k.prepareTarget(n, dst, a.DirCopyContents)
	if err != nil {
		return err
	}
	defer c.fixParents(created, a.Timestamp)
	return k.copy(ctx, from, "", dst, n, false, patternmatcher.MatchInfo{}, patternmatcher.MatchInfo{})
}

func newCopier(c *Changes, src tree.Tree, s string, own *owner, a CopyAction, req *required) (*copier, error) {
	k := &copier{
		c: c, src: src, from: s, own: own, utime: a.Timestamp, links: map[uint64]string{},
		replace: a.AlwaysReplaceExistingDestPaths, required: req,
	}
	if a.ModeStr != "" {
		ms, err := mode.ParseWithUmask(a.ModeStr, 0)
		if err != nil {
			return nil, fmt.Errorf("invalid mode %q: %w", a.ModeStr, err)
		}
		k.modeSet = &ms
	} else {
		k.mode = a.Mode
	}
	var err error
	if len(a.IncludePatterns) > 0 {
		if k.include, err = patternmatcher.New(a.IncludePatterns); err != nil {
			return nil, fmt.Errorf("invalid includepatterns: %q: %w", a.IncludePatterns, err)
		}
	}
	if len(a.ExcludePatterns) > 0 {
		if k.exclude, err = patternmatcher.New(a.ExcludePatterns); err != nil {
			return nil, fmt.Errorf("invalid excludepatterns: %q: %w", a.ExcludePatterns, err)
		}
	}
	return k, nil
}

// dirMode is the mode of parent directories that are made.
func (k *copier) dirMode() uint32 {
	if k.mode != nil {
		return *k.mode & 0o777
	}
	return defaultDirMode
}

// prepareTarget decides between "to dst" and "into dst", and makes parents.
func (k *copier) prepareTarget(n tree.Node, dst string, contents bool) (string, []string, error) {
	d, err := k.c.lstat(dst)
	exists := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", nil, fmt.Errorf("failed to lstat destination path: %w", err)
	}
	if !contents && n.IsDir() && exists || !n.IsDir() && exists && d.IsDir() {
		dst = path.Join(dst, path.Base(k.from))
	}
	target := path.Dir(dst)
	if contents && n.IsDir() && !exists {
		target = dst
	}
	created, err := k.c.mkdirAll(target, k.dirMode(), k.own, k.utime)
	return dst, created, err
}

// copy copies from (comps relative to the root of this copy) to dst. into: dst's
// metadata may be overwritten if it is a directory already.
func (k *copier) copy(ctx context.Context, from, comps, dst string, n tree.Node, into bool, upInc, upExc patternmatcher.MatchInfo) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	include, excluded, inc, exc, err := k.selected(comps, upInc, upExc)
	if err != nil {
		return err
	}
	if !include && (!n.IsDir() || k.nothingBelow()) {
		return nil
	}
	exists := false
	if include {
		if exists, err = k.makeWay(comps, dst, n, into); err != nil {
			return err
		}
	}
	if !n.IsDir() {
		return k.file(from, dst, n)
	}
	created, err := k.directory(ctx, from, comps, dst, n, into, include, excluded, inc, exc)
	if err != nil {
		return err
	}
	switch {
	case into && include, !into && created:
		return k.info(dst, n)
	case !into && exists:
		return k.timestamp(dst, n)
	}
	return nil
}

// makeWay prepares dst for what is selected, and says whether something is there.
func (k *copier) makeWay(comps, dst string, n tree.Node, into bool) (exists bool, err error) {
	old, err := k.c.lstat(dst)
	exists = err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("failed to stat: %w", err)
	}
	k.required.saw(path.Join("/", k.from, comps))
	if k.replace && exists && (!n.IsDir() || !old.IsDir()) {
		if err := k.c.remove(dst); err != nil {
			return false, err
		}
	}
	return exists, k.makeParents(into)
}

// selected asks the patterns about a path.
func (k *copier) selected(comps string, upInc, upExc patternmatcher.MatchInfo) (include, excluded bool, inc, exc patternmatcher.MatchInfo, err error) {
	include = true
	if comps == "" {
		return include, false, inc, exc, nil
	}
	if k.include != nil {
		if include, inc, err = k.include.MatchesUsingParentResults(comps, upInc); err != nil {
			return false, false, inc, exc, fmt.Errorf("failed to match includepatterns: %w", err)
		}
	}
	if k.exclude != nil {
		if excluded, exc, err = k.exclude.MatchesUsingParentResults(comps, upExc); err != nil {
			return false, false, inc, exc, fmt.Errorf("failed to match excludepatterns: %w", err)
		}
	}
	return include && !excluded, excluded, inc, exc, nil
}

// nothingBelow says that in a directory which is not selected nothing can be:
// there are no include patterns and no exceptions to exclude patterns.
func (k *copier) nothingBelow() bool {
	return k.include == nil && (k.exclude == nil || !k.exclude.Exclusions())
}

// directory copies a directory's content, and makes it if it is itself selected.
func (k *copier) directory(ctx context.Context, from, comps, dst string, n tree.Node, into, include, excluded bool, inc, exc patternmatcher.MatchInfo) (bool, error) {
	up := parentDir{node: n, dst: dst}
	created := false
	if include {
		var err error
		if created, err = k.onlyDirectory(dst, n, into); err != nil {
			return false, err
		}
		up.copied = true
	}
	k.parents = append(k.parents, up)
	defer func() { k.parents = k.parents[:len(k.parents)-1] }()

	if excluded && !k.exclude.Exclusions() {
		return false, nil
	}
	es, err := k.src.ReadDir(from)
	if err != nil {
		return false, fmt.Errorf("failed to read %s: %w", from, err)
	}
	for _, e := range es {
		err := k.copy(ctx, path.Join(from, e.Name), path.Join(comps, e.Name), path.Join(dst, e.Name), e.Node, true, inc, exc)
		if err != nil {
			return false, err
		}
	}
	return created, nil
}

// makeParents makes the directories on the way down that were not selected by
// themselves, now that something in them is.
func (k *copier) makeParents(into bool) error {
	for i := range k.parents {
		d := &k.parents[i]
		if d.copied {
			continue
		}
		created, err := k.onlyDirectory(d.dst, d.node, into)
		if err != nil {
			return err
		}
		if created {
			if err := k.info(d.dst, d.node); err != nil {
				return err
			}
		}
		d.copied = true
	}
	return nil
}

// cleanPath makes a path absolute and clean, but keeps a "/" or "/." at its end.
func cleanPath(s string) string {
	c := path.Join("/", s)
	switch {
	case strings.HasSuffix(s, "/."):
		return strings.TrimSuffix(c, "/") + "/."
	case strings.HasSuffix(s, "/") && c != "/":
		return c + "/"
	}
	return c
}

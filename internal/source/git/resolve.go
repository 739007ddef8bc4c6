package git

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Found is what a Ref leads to in the remote repository.
type Found struct {
	Ref    string // full name; empty if there is none
	Hash   string // of a commit or an annotated tag
	Peeled string // of the commit that an annotated tag is for, if the server says; else empty
}

// Commit is the commit's hash, or the annotated tag's if the server did not say the commit.
func (f Found) Commit() string { return cmp.Or(f.Peeled, f.Hash) }

// Check compares with the beginning of a hash that somebody insists on; empty: nobody does.
func (f Found) Check(sum string) error {
	if strings.HasPrefix(f.Hash, sum) || f.Peeled != "" && strings.HasPrefix(f.Peeled, sum) {
		return nil
	}
	got := f.Hash
	if f.Peeled != "" {
		got += " or " + f.Peeled
	}
	return fmt.Errorf("expected checksum to match %s, got %s", sum, got)
}

// resolve asks the server what the ref is now. A full hash needs no asking.
func (f *fetcher) resolve(ctx context.Context) (w Found, err error) {
	r := f.ref
	switch {
	case isHash(r.Rev):
		w.Hash = r.Rev
	case r.FetchByCommit:
		w.Hash = r.Checksum
		if r.Rev != "" {
			w.Ref = "refs/heads/" + r.Rev
			if strings.HasPrefix(r.Rev, "refs/") {
				w.Ref = r.Rev
			}
		}
	case r.Rev == "":
		w, err = f.resolveHead(ctx)
	default:
		w, err = f.resolveRef(ctx)
	}
	if err != nil {
		return w, err
	}
	if !isHash(w.Hash) || w.Peeled != "" && !isHash(w.Peeled) {
		return w, fmt.Errorf("server says that the ref is %q", w.Hash)
	}
	return w, w.Check(r.Checksum)
}

// resolveHead finds the default branch.
func (f *fetcher) resolveHead(ctx context.Context) (w Found, err error) {
	out, err := f.git.run(ctx, "ls-remote", "--symref", "--", f.url, "HEAD")
	if err != nil {
		return w, err
	}
	for line := range strings.Lines(out) {
		v, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		if name != "HEAD" {
			continue
		}
		if ref, ok := strings.CutPrefix(v, "ref: "); !ok {
			w.Hash = v
		} else if strings.HasPrefix(ref, "refs/heads/") && (&Ref{Rev: ref}).Validate() == nil {
			w.Ref = ref
		}
	}
	if w.Hash == "" {
		return w, errors.New("the repository has no default branch; name one with #BRANCH")
	}
	return w, nil
}

// resolveRef finds a branch, a tag or another ref by its short or full name, in
// the order in which BuildKit looks: the full name, the branch, the tag.
func (f *fetcher) resolveRef(ctx context.Context) (w Found, err error) {
	rev := f.ref.Rev
	out, err := f.git.run(ctx, "ls-remote", "--", f.url, rev, rev+"^{}")
	if err != nil {
		return w, err
	}
	refs := map[string]string{}
	for line := range strings.Lines(out) {
		hash, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		refs[name] = hash
	}
	for _, name := range []string{
		"refs/" + strings.TrimPrefix(rev, "refs/"),
		"refs/heads/" + strings.TrimPrefix(rev, "refs/heads/"),
		"refs/tags/" + strings.TrimPrefix(rev, "refs/tags/"),
	} {
		if hash, ok := refs[name]; ok {
			return Found{Ref: name, Hash: hash, Peeled: refs[name+"^{}"]}, nil
		}
	}
	return w, fmt.Errorf("the repository does not contain ref %s: no branch or tag has that name", rev)
}

// wantedRef is the name that what was fetched has in our repository.
const wantedRef = "refs/kiln/wanted"

// fetchCommit fetches what is wanted, and as little more as the server allows.
func (f *fetcher) fetchCommit(ctx context.Context) error {
	get := func(args ...string) error {
		_, err := f.git.run(ctx, append([]string{"fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head"}, args...)...)
		return err
	}
	w := f.found
	err := get("--depth=1", "--", f.url, "+"+w.Hash+":"+wantedRef)
	if err != nil && w.Ref != "" && ctx.Err() == nil && noHash(err) {
		err = get("--depth=1", "--", f.url, "+"+w.Ref+":"+wantedRef)
	}
	if err != nil && ctx.Err() == nil && (noHash(err) || noShallow(err)) {
		err = get("--", f.url, "+refs/heads/*:refs/kiln/heads/*", "+refs/tags/*:refs/kiln/tags/*")
	}
	if err != nil {
		return err
	}
	f.commit, err = f.parse(ctx, w.Hash)
	if err != nil && w.Peeled != "" && !f.keep { // the tag is another by now
		f.commit, err = f.parse(ctx, w.Peeled)
	}
	if err != nil {
		if w.Ref != "" {
			return fmt.Errorf("%s changed while it was being fetched: it has no commit %s any more", w.Ref, w.Hash)
		}
		return fmt.Errorf("the repository has no commit %s", w.Hash)
	}
	if sum := f.ref.Checksum; !strings.HasPrefix(f.commit, sum) && !strings.HasPrefix(w.Hash, sum) {
		return fmt.Errorf("expected checksum to match %s, got %s", sum, f.commit)
	}
	return nil
}

// parse is the hash of the commit that a hash leads to in our repository.
func (f *fetcher) parse(ctx context.Context, hash string) (string, error) {
	out, err := f.git.run(ctx, "rev-parse", "--verify", "--quiet", "--end-of-options", hash+"^{commit}")
	return strings.TrimSpace(out), err
}

// maxObject bounds a commit or a tag: both are lines of text.
const maxObject = 1 << 20

// objects reads what was fetched.
func (f *fetcher) objects(ctx context.Context) (o Objects, err error) {
	read := func(kind, hash string) ([]byte, error) {
		out, err := f.git.run(ctx, "cat-file", kind, hash)
		if err == nil && len(out) > maxObject {
			err = fmt.Errorf("the %s %s has %d bytes: more than %d are refused", kind, hash, len(out), maxObject)
		}
		return []byte(out), err
	}
	o.CommitHash = f.commit
	if o.Commit, err = read("commit", f.commit); err != nil || f.found.Hash == f.commit {
		return o, err
	}
	if o.Tag, err = read("tag", f.found.Hash); err == nil {
		o.TagHash = f.found.Hash
	}
	return o, err
}

// noHash reports whether a server refused to send an object by its hash.
func noHash(err error) bool {
	return stderrHas(err, "not our ref", "unadvertised object", "couldn't find remote ref", "no such remote ref", "does not allow request")
}

// noShallow reports whether a server, or a protocol, can send whole histories only.
func noShallow(err error) bool { return stderrHas(err, "shallow", "--depth") }

func stderrHas(err error, texts ...string) bool {
	var ce *commandError
	if !errors.As(err, &ce) {
		return false
	}
	for _, t := range texts {
		if strings.Contains(ce.stderr, t) {
			return true
		}
	}
	return false
}

// measure refuses a commit whose files would fill the disk: trees in git can be
// made that are far larger checked out than in the repository.
func (f *fetcher) measure(ctx context.Context) error {
	files, size := 0, int64(0)
	return f.git.stream(ctx, func(r *bufio.Reader) error {
		for {
			// mode SP type SP hash SP+ size TAB path NUL
			line, err := r.ReadString(0)
			if line == "" {
				return nil //nolint:nilerr // git's own end says whether that was all
			}
			if err != nil {
				return err
			}
			meta, _, _ := strings.Cut(line, "\t")
			if fields := strings.Fields(meta); len(fields) == 4 && fields[1] == "blob" {
				n, err := strconv.ParseInt(fields[3], 10, 64)
				if err != nil {
					return fmt.Errorf("git's listing says %q", meta)
				}
				size += n
			}
			if files++; files > f.o.MaxFiles {
				return fmt.Errorf("the commit has more than %d files", f.o.MaxFiles)
			}
			if size > f.o.MaxBytes {
				return fmt.Errorf("the commit's files have more than %d bytes", f.o.MaxBytes)
			}
		}
	}, "ls-tree", "-r", "-t", "-l", "-z", "--full-tree", f.commit)
}

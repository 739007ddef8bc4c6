package git

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// wanted is what a Ref leads to in the remote repository.
type wanted struct {
	ref    string // full name; empty if there is none
	hash   string // of a commit or an annotated tag
	peeled string // of the commit that an annotated tag is for, if the server says
}

// resolve asks the server what the ref is now. A full hash needs no asking.
func (f *fetcher) resolve(ctx context.Context) (w wanted, err error) {
	r := f.ref
	switch {
	case isHash(r.Rev):
		w.hash = r.Rev
	case r.FetchByCommit:
		w.hash = r.Checksum
		if r.Rev != "" {
			w.ref = "refs/heads/" + r.Rev
			if strings.HasPrefix(r.Rev, "refs/") {
				w.ref = r.Rev
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
	if !isHash(w.hash) || w.peeled != "" && !isHash(w.peeled) {
		return w, fmt.Errorf("server says that the ref is %q", w.hash)
	}
	return w, nil
}

// resolveHead finds the default branch.
func (f *fetcher) resolveHead(ctx context.Context) (w wanted, err error) {
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
			w.hash = v
		} else if strings.HasPrefix(ref, "refs/heads/") && (&Ref{Rev: ref}).Validate() == nil {
			w.ref = ref
		}
	}
	if w.hash == "" {
		return w, errors.New("the repository has no default branch; name one with #BRANCH")
	}
	return w, nil
}

// resolveRef finds a branch, a tag or another ref by its short or full name, in
// the order in which BuildKit looks: the full name, the branch, the tag.
func (f *fetcher) resolveRef(ctx context.Context) (w wanted, err error) {
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
			return wanted{ref: name, hash: hash, peeled: refs[name+"^{}"]}, nil
		}
	}
	return w, fmt.Errorf("the repository has no branch or tag %q", rev)
}

// wantedRef is the name that what was fetched has in our repository.
const wantedRef = "refs/kiln/wanted"

// fetchCommit fetches what is wanted, and as little more as the server allows.
func (f *fetcher) fetchCommit(ctx context.Context) error {
	get := func(args ...string) error {
		_, err := f.git.run(ctx, append([]string{"fetch", "--quiet", "--no-tags", "--no-recurse-submodules", "--no-write-fetch-head"}, args...)...)
		return err
	}
	w := f.wanted
	err := get("--depth=1", "--", f.url, "+"+w.hash+":"+wantedRef)
	if err != nil && w.ref != "" && ctx.Err() == nil && noHash(err) {
		err = get("--depth=1", "--", f.url, "+"+w.ref+":"+wantedRef)
	}
	if err != nil && ctx.Err() == nil && (noHash(err) || noShallow(err)) {
		err = get("--", f.url, "+refs/heads/*:refs/kiln/heads/*", "+refs/tags/*:refs/kiln/tags/*")
	}
	if err != nil {
		return err
	}
	out, err := f.git.run(ctx, "rev-parse", "--verify", "--quiet", "--end-of-options", w.hash+"^{commit}")
	if err != nil {
		if w.ref != "" {
			return fmt.Errorf("%s changed while it was being fetched: it has no commit %s any more", w.ref, w.hash)
		}
		return fmt.Errorf("the repository has no commit %s", w.hash)
	}
	f.commit = strings.TrimSpace(out)
	if sum := f.ref.Checksum; !strings.HasPrefix(f.commit, sum) && !strings.HasPrefix(w.hash, sum) {
		return fmt.Errorf("the checksum says %s, but the commit is %s", sum, f.commit)
	}
	return nil
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

package peer

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/source/statcache"
	"github.com/kiln-build/kiln/internal/tree"
)

// tick is more than the granularity of clocks of file systems that have times with parts of a second. A file that
// was changed longer ago than that cannot change again and keep its time.
const tick = 100 * time.Millisecond

// seen knows the content of files that were sent for an earlier build and have not changed since, so that
// they need not be sent again to find that out. A client says no more of a file's state than its size and the time
// when it was changed, which anybody can set. So a time counts only if it is none that tools give to all
// files alike: it has a part of a second. BuildKit trusts every time.
type seen struct {
	cache *statcache.Cache
	space string // tells contexts of different clients, and of one client, apart
	began time.Time
}

// sig is the state of a file in the cache's terms; ok is false if it does not tell one content from another.
func (s *seen) sig(p string, n tree.Node) (sig statcache.Sig, ok bool) {
	t := n.MTime.UnixNano()
	if s == nil || t%int64(time.Second) == 0 {
		return sig, false
	}
	id := sha256.Sum256([]byte(s.space + "\x00" + p))
	return statcache.Sig{
		Dev: binary.LittleEndian.Uint64(id[:]), Ino: binary.LittleEndian.Uint64(id[8:]), Size: n.Size, MTime: t, CTime: t,
	}, true
}

// put keeps what the content of a file in that state was.
func (s *seen) put(sig statcache.Sig, sum statcache.Sum) {
	s.cache.Put(sig, sum, s.began.Add(statcache.Young-tick))
}

// space is what files of a context are remembered under.
func space(owner, session string, parts ...string) string {
	all := append([]string{owner, session}, parts...)
	for i, p := range all {
		all[i] = fmt.Sprintf("%d:%s", len(p), p) // none can pretend to be two
	}
	return strings.Join(all, "")
}

// errChanged says that a time has deceived.
var errChanged = errors.New("its content has changed, but neither its size nor its time has: build again")

// ContentDigest implements tree.Digester. A file whose content is known is not asked for. From then on, opening
// it gives that content, or an error.
func (f *files) ContentDigest(p string) (digest.Digest, error) {
	e, err := f.lookup("digest", p)
	if err != nil {
		return "", err
	}
	if e.body == nil {
		return "", &fs.PathError{Op: "digest", Path: p, Err: errors.New("not a regular file")}
	}
	b := e.body
	f.mu.Lock()
	given := b.given
	f.mu.Unlock()
	if given != "" {
		return given, nil
	}
	sig, tells := f.seen.sig(p, e.node)
	if tells {
		if sum, ok := f.seen.cache.Get(sig); ok {
			return f.give(b, digest.NewDigestFromBytes(digest.SHA256, sum[:]), false), nil
		}
	}
	sum, err := f.sum(b)
	if err != nil {
		return "", &fs.PathError{Op: "digest", Path: p, Err: err}
	}
	if tells {
		f.seen.put(sig, sum)
	}
	return f.give(b, digest.NewDigestFromBytes(digest.SHA256, sum[:]), true), nil
}

// give keeps the digest that was given for a file's content, the first one, and whether the content had it.
func (f *files) give(b *body, d digest.Digest, verified bool) digest.Digest {
	f.mu.Lock()
	defer f.mu.Unlock()
	if b.given == "" {
		b.given, b.verified = d, verified
	}
	return b.given
}

// sum is that of a file's content, which is asked for.
func (f *files) sum(b *body) (sum statcache.Sum, err error) {
	h := sha256.New()
	if b.size > 0 {
		if err := f.ask(b); err != nil {
			return sum, err
		}
		if _, err := io.Copy(h, io.NewSectionReader(f.spool, b.offset, b.size)); err != nil {
			return sum, err
		}
	}
	h.Sum(sum[:0])
	return sum, nil
}

// verify sees to it that a file that was sent has the content that was promised for it.
func (f *files) verify(p string, e *entry) error {
	b := e.body
	f.mu.Lock()
	given, verified := b.given, b.verified
	f.mu.Unlock()
	if given == "" || verified {
		return nil
	}
	sum, err := f.sum(b)
	if err != nil {
		return err
	}
	if digest.NewDigestFromBytes(digest.SHA256, sum[:]) != given {
		if sig, tells := f.seen.sig(p, e.node); tells {
			f.seen.put(sig, sum) // or every build would fail
		}
		return errChanged
	}
	f.mu.Lock()
	b.verified = true
	f.mu.Unlock()
	return nil
}

var _ tree.Digester = (*files)(nil)

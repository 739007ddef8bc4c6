package remote

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	nethttp "net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/source/http"
	"github.com/kiln-build/kiln/internal/tree"
)

// HTTP is a file of an http server, in a directory of its own.
type HTTP struct {
	URL      string
	Filename string        // empty: what the server calls it, or the URL
	Checksum digest.Digest // of its content; empty: any
	Perm     uint32        // permissions; 0: 0600, as BuildKit has it
	UID, GID uint32
	// Accept and UserAgent are headers of the request; may be empty.
	Accept, UserAgent string
	// AuthSecret is the ID of the secret that is the Authorization header. Empty: HTTP_AUTH_HEADER_HOST
	// or HTTP_AUTH_TOKEN_HOST, if there is one.
	AuthSecret string
}

func (h *HTTP) String() string { return http.Redact(h.URL) }

// Names of the secrets that are for a host, as BuildKit has them.
const (
	authHeaderPrefix = "HTTP_AUTH_HEADER_"
	authTokenPrefix  = "HTTP_AUTH_TOKEN_"
)

// uploadTime is how long a client may take to send what it uploads; its session may end before.
const uploadTime = 24 * time.Hour

// memoryKind is under what the store remembers what servers said.
const memoryKind = "http"

// said is what a server said of a file.
type said struct {
	ETag         string        `json:"etag"`
	Digest       digest.Digest `json:"digest"` // of the content
	Filename     string        `json:"filename"`
	LastModified time.Time     `json:"lastModified,omitzero"`
}

// Resolve implements Source. With a checksum the server is not asked: the
// version is known. Otherwise it is asked whether the file is still
// what it was the last time.
func (h *HTTP) Resolve(ctx context.Context, env *Env, progress Progress) (Version, error) {
	v := &httpVersion{h: h, env: env}
	if h.Checksum != "" {
		v.said = said{Digest: h.Checksum, Filename: filename(h.URL, h.Filename, "")}
		return v, nil
	}
	var err error
	if v.got, err = v.find(ctx, progress); err != nil {
		return nil, err
	}
	v.said = v.got.said
	return v, nil
}

// memoryKey is different for requests that may have different answers.
func (h *HTTP) memoryKey() string {
	b, err := json.Marshal([]string{h.URL, h.Filename, h.Accept, h.UserAgent, h.AuthSecret})
	if err != nil {
		panic(err) // strings
	}
	return digest.FromBytes(b).String() // the URL may have a credential in it
}

type httpVersion struct {
	h    *HTTP
	env  *Env
	said said
	got  *download // nil: the server was not asked yet
}

// download is what a server sent.
type download struct {
	said said
	file string // where the content is; empty: the server said that it is what is known already
	size int64
}

// Key implements Version.
func (v *httpVersion) Key() []string {
	when := ""
	if !v.said.LastModified.IsZero() {
		when = v.said.LastModified.UTC().Format(time.RFC3339)
	}
	return []string{
		"http", v.said.Filename, v.said.Digest.String(), when, strconv.FormatUint(uint64(v.perm()), 8),
		strconv.FormatUint(uint64(v.h.UID), 10), strconv.FormatUint(uint64(v.h.GID), 10),
	}
}

func (v *httpVersion) perm() uint32 { return cmp.Or(v.h.Perm&tree.ModePerm, 0o600) }

// Open implements Version.
func (v *httpVersion) Open(ctx context.Context, progress Progress) (tree.Tree, error) {
	d, err := v.content(ctx, progress)
	if err != nil {
		return nil, err
	}
	n := tree.Node{Mode: tree.ModeRegular | v.perm(), UID: v.h.UID, GID: v.h.GID, Size: d.size, MTime: time.Unix(0, 0)}
	if !d.said.LastModified.IsZero() {
		n.MTime = d.said.LastModified
	}
	return &oneFile{name: d.said.Filename, node: n, path: d.file, digest: d.said.Digest}, nil
}

// Metadata implements Version.
func (v *httpVersion) Metadata(ctx context.Context, ask Ask) (Metadata, error) {
	md := &HTTPMetadata{Digest: v.said.Digest, Filename: v.said.Filename, LastModified: v.said.LastModified}
	if ask.Algorithm == "" {
		return Metadata{HTTP: md}, nil
	}
	d, err := v.content(ctx, nil)
	if err != nil {
		return Metadata{}, err
	}
	md.Filename, md.LastModified = d.said.Filename, d.said.LastModified
	md.Checksum, err = d.checksum(ask.Algorithm, ask.Suffix)
	return Metadata{HTTP: md}, err
}

// checksum is that of the content with a suffix.
func (d *download) checksum(a digest.Algorithm, suffix []byte) (digest.Digest, error) {
	if !a.Available() {
		return "", fmt.Errorf("the checksum algorithm %q is not supported", a)
	}
	f, err := os.Open(d.file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return a.FromReader(io.MultiReader(f, bytes.NewReader(suffix)))
}

// Close implements Version.
func (v *httpVersion) Close() error {
	if v.env.Pins != nil || v.got == nil || v.got.file == "" {
		return nil
	}
	return os.Remove(v.got.file)
}

// find asks the server for the file, or whether it is still the known one.
func (v *httpVersion) find(ctx context.Context, progress Progress) (*download, error) {
	return pinned(ctx, v.env.Pins, "http "+v.h.memoryKey(), func() (*download, error) { return v.fetch(ctx, v.known(), progress) })
}

// content is the version with its content.
func (v *httpVersion) content(ctx context.Context, progress Progress) (_ *download, err error) {
	if v.got == nil {
		if v.got, err = v.find(ctx, progress); err != nil {
			return nil, err
		}
	}
	if v.got.file == "" {
		again := func() (*download, error) { return v.fetch(ctx, said{}, progress) }
		if v.got, err = pinned(ctx, v.env.Pins, "http content "+v.h.memoryKey(), again); err != nil {
			return nil, err
		}
	}
	if got := v.got.said.Digest; got != v.said.Digest {
		return nil, fmt.Errorf("fetch %s: digest mismatch: %s (expected: %s)", v.h, got, v.said.Digest)
	}
	return v.got, nil
}

// known is what the server said the last time, empty if it was not asked yet.
func (v *httpVersion) known() (known said) {
	if v.env.Memory == nil {
		return said{}
	}
	b, err := v.env.Memory.GetRecord(memoryKind, v.h.memoryKey())
	if err != nil || json.Unmarshal(b, &known) != nil || known.Digest.Validate() != nil {
		return said{}
	}
	return known
}

// fetch fetches the file, unless it is still the known one.
func (v *httpVersion) fetch(ctx context.Context, known said, progress Progress) (*download, error) {
	o := http.Options{Env: v.env.Environ, MaxBytes: v.env.Limits.MaxBytes, ETag: known.ETag, Header: nethttp.Header{}}
	if u, err := url.Parse(v.h.URL); err == nil && u.Host == UploadHost && v.env.Uploads != nil {
		o.Transport, o.Retries, o.Stall = v.env.Uploads, -1, uploadTime
	} else if err := v.headers(ctx, o.Header); err != nil {
		return nil, err
	}
	resp, err := http.Get(ctx, v.h.URL, o)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.NotModified {
		return &download{said: known}, nil
	}
	d := &download{said: said{
		ETag: resp.ETag, LastModified: resp.LastModified, Filename: filename(v.h.URL, v.h.Filename, resp.Disposition),
	}}
	if err := d.save(resp, v.env.Dir, progress); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", v.h, err)
	}
	if err := v.remember(d.said); err != nil {
		return nil, errors.Join(err, os.Remove(d.file))
	}
	return d, nil
}

// remember keeps what the server said for the next time.
func (v *httpVersion) remember(s said) error {
	if s.ETag == "" || v.env.Memory == nil {
		return nil
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return v.env.Memory.PutRecord(memoryKind, v.h.memoryKey(), b)
}

func (v *httpVersion) headers(ctx context.Context, h nethttp.Header) error {
	for name, value := range map[string]string{"Accept": v.h.Accept, "User-Agent": v.h.UserAgent} {
		if value != "" {
			h.Set(name, value)
		}
	}
	auth, err := v.authorization(ctx)
	if err != nil || auth == "" {
		return err
	}
	if strings.ContainsFunc(auth, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return fmt.Errorf("fetch %s: the secret for its Authorization header is no header's value", v.h)
	}
	h.Set("Authorization", auth)
	return nil
}

func (v *httpVersion) authorization(ctx context.Context) (string, error) {
	if id := v.h.AuthSecret; id != "" {
		auth, err := v.env.secret(ctx, id)
		if err == nil && auth == "" {
			err = fmt.Errorf("fetch %s: there is no secret %q", v.h, id)
		}
		return auth, err
	}
	u, err := url.Parse(v.h.URL)
	if err != nil {
		return "", nil //nolint:nilerr // the request says what is wrong
	}
	id, value, err := v.env.firstSecret(ctx, authHeaderPrefix+u.Hostname(), authTokenPrefix+u.Hostname())
	if strings.HasPrefix(id, authTokenPrefix) {
		value = "Bearer " + value
	}
	return value, err
}

// save writes a response's body to a file in dir.
func (d *download) save(resp *http.Response, dir string, progress Progress) (err error) {
	f, err := os.CreateTemp(dir, "http-*")
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	h := digest.SHA256.Hash()
	n, err := io.Copy(io.MultiWriter(f, h), &counted{Reader: resp.Body, total: resp.Size, progress: progress})
	if err != nil {
		return err
	}
	d.file, d.size, d.said.Digest = f.Name(), n, digest.NewDigest(digest.SHA256, h)
	return nil
}

type counted struct {
	io.Reader
	n, total int64
	progress Progress
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	if c.n += int64(n); c.progress != nil {
		c.progress(c.n, c.total)
	}
	return n, err
}

// filename is what a file is called, as BuildKit does it: by who wants it, else by the server, else by its URL.
func filename(rawURL, wanted, disposition string) string {
	names := []string{wanted}
	if _, params, err := mime.ParseMediaType(disposition); err == nil && !strings.HasSuffix(params["filename"], "/") {
		names = append(names, filepath.Base(params["filename"]))
	}
	if u, err := url.Parse(rawURL); err == nil {
		names = append(names, path.Base(u.Path))
	}
	i := slices.IndexFunc(names, func(n string) bool {
		return n != "" && n != "." && n != ".." && !strings.ContainsAny(n, "/\x00") && len(n) <= 255
	})
	if i < 0 {
		return "download"
	}
	return names[i]
}

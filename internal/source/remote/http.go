package remote

import (
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
	var known said
	if env.Memory != nil {
		if b, err := env.Memory.GetRecord(memoryKind, h.memoryKey()); err == nil && json.Unmarshal(b, &known) != nil {
			known = said{}
		}
	}
	if known.Digest.Validate() != nil {
		known = said{}
	}
	return v, v.fetch(ctx, known, progress)
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
	file string // where the content is; empty: not fetched
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
	if v.file == "" {
		want := v.said.Digest
		if err := v.fetch(ctx, said{}, progress); err != nil {
			return nil, err
		}
		if v.said.Digest != want {
			return nil, fmt.Errorf("fetch %s: digest mismatch: %s (expected: %s)", v.h, v.said.Digest, want)
		}
	}
	n := tree.Node{Mode: tree.ModeRegular | v.perm(), UID: v.h.UID, GID: v.h.GID, Size: v.size, MTime: time.Unix(0, 0)}
	if !v.said.LastModified.IsZero() {
		n.MTime = v.said.LastModified
	}
	return &oneFile{name: v.said.Filename, node: n, path: v.file, digest: v.said.Digest}, nil
}

// Close implements Version.
func (v *httpVersion) Close() error {
	if v.file == "" {
		return nil
	}
	return os.Remove(v.file)
}

// fetch fetches the file, unless it is still the known one.
func (v *httpVersion) fetch(ctx context.Context, known said, progress Progress) error {
	o := http.Options{Env: v.env.Environ, MaxBytes: v.env.Limits.MaxBytes, ETag: known.ETag, Header: nethttp.Header{}}
	if u, err := url.Parse(v.h.URL); err == nil && u.Host == UploadHost && v.env.Uploads != nil {
		o.Transport, o.Retries, o.Stall = v.env.Uploads, -1, uploadTime
	} else if err := v.headers(ctx, o.Header); err != nil {
		return err
	}
	resp, err := http.Get(ctx, v.h.URL, o)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.NotModified {
		v.said = known
		return nil
	}
	v.said = said{
		ETag: resp.ETag, LastModified: resp.LastModified, Filename: filename(v.h.URL, v.h.Filename, resp.Disposition),
	}
	if err := v.save(resp, progress); err != nil {
		return fmt.Errorf("fetch %s: %w", v.h, err)
	}
	if v.said.ETag == "" || v.env.Memory == nil {
		return nil
	}
	b, err := json.Marshal(v.said)
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

// save writes a response's body to a file.
func (v *httpVersion) save(resp *http.Response, progress Progress) (err error) {
	f, err := os.CreateTemp(v.env.Dir, "http-*")
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
	v.file, v.size, v.said.Digest = f.Name(), n, digest.NewDigest(digest.SHA256, h)
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

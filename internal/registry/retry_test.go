package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/registrytest"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const unknownUpload = `{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN","message":"blob upload unknown to registry"}]}`

func TestUploadsSurviveTrouble(t *testing.T) {
	const put, post, uploads = http.MethodPut, http.MethodPost, "/blobs/uploads/"
	for name, f := range map[string]registrytest.Fault{
		"503":             {Method: put, Path: uploads, Times: 2, Status: 503},
		"500 on begin":    {Method: post, Path: uploads, Times: 3, Status: 500},
		"429":             {Method: put, Path: uploads, Times: 2, Status: 429, RetryAfter: "0"},
		"408":             {Method: put, Path: uploads, Times: 1, Status: 408},
		"reset":           {Method: put, Path: uploads, Times: 2, Reset: true, After: 300_000},
		"reset at once":   {Method: put, Path: uploads, Times: 2, Reset: true},
		"reset on begin":  {Method: post, Path: uploads, Times: 2, Reset: true},
		"stall":           {Method: put, Path: uploads, Times: 1, Stall: true},
		"stall midway":    {Method: put, Path: uploads, Times: 1, Serve: stallMidway},
		"forgotten":       {Method: put, Path: uploads, Times: 1, Status: 404, Body: unknownUpload},
		"gateway's page":  {Method: put, Path: uploads, Times: 1, Status: 502, Body: "<html>bad gateway"},
		"head 500":        {Method: http.MethodHead, Path: "/blobs/", Times: 2, Status: 500},
		"head always 500": {Method: http.MethodHead, Path: "/blobs/", Status: 500},
		"head 401":        {Method: http.MethodHead, Path: "/blobs/", Status: 401},
		"head 403":        {Method: http.MethodHead, Path: "/blobs/", Status: 403},
		"head 405":        {Method: http.MethodHead, Path: "/blobs/", Status: 405},
		"manifest 504":    {Method: put, Path: "/manifests/", Times: 2, Status: 504},
		"manifest reset":  {Method: put, Path: "/manifests/", Times: 2, Reset: true, After: 10},
		"ping":            {Path: "/v2/", Times: 2, Status: 502},
	} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, registrytest.Options{User: "ann", Password: "pw", Token: true})
			r.Fail(f)
			c := newClient(t, as("ann", "pw"))
			img := pushed(t, c, r.Host()+"/a/b:c", 1<<20)
			if got := r.Counts(); got.Failed == 0 {
				t.Error("nothing failed")
			}
			r.Heal()
			got := resolve(t, newClient(t, as("ann", "pw")), r.Host()+"/a/b:c")
			b, err := fetch(t.Context(), c, got.Layers[0])
			if err != nil || !bytes.Equal(b, img.layers[0]) {
				t.Error(err)
			}
		})
	}
}

func stallMidway(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
	_, _ = io.CopyN(io.Discard, r.Body, 1000)
	time.Sleep(time.Second) // the server does not see the client go while there is more to read
	panic(http.ErrAbortHandler)
}

func TestRefusalsAreFinal(t *testing.T) {
	for _, status := range []int{400, 401, 403, 404, 413} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			r := registrytest.New(t, registrytest.Options{})
			p := pusher(t, newClient(t, as("ann", "pw")), r.Host()+"/a/b:c")
			r.Fail(registrytest.Fault{Method: http.MethodPut, Status: status, Body: `{"errors":[{"code":"X","message":"because of me"}]}`})
			b := noise(t, 100)
			_, err := p.Blob(t.Context(), describe(ocispec.MediaTypeImageLayer, b), "", opener(b), nil)
			wantError(t, err, strconv.Itoa(status), "because of me", r.Host(), `"a/b"`, describe("", b).Digest.String())
			if n := r.Counts().Failed; n != 1 {
				t.Errorf("tried %d times", n)
			}
			_, err = p.Manifest(t.Context(), ocispec.MediaTypeImageManifest, []byte("{}"))
			wantError(t, err, strconv.Itoa(status), "because of me")
			if n := r.Counts().Failed; n != 2 {
				t.Errorf("tried %d times", n-1)
			}
		})
	}
}

func TestRetriesEnd(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	p := pusher(t, newClient(t), r.Host()+"/a/b:c")
	r.Fail(registrytest.Fault{Method: http.MethodPut, Status: 503, Body: "down for today"})
	b := noise(t, 100)
	opened := 0
	open := func() (io.ReadCloser, error) {
		opened++
		return opener(b)()
	}
	_, err := p.Blob(t.Context(), describe("", b), "", open, nil)
	wantError(t, err, "503 Service Unavailable: down for today")
	if opened != 4 || r.Counts().Failed != 4 {
		t.Errorf("opened %d times, tried %d times", opened, r.Counts().Failed)
	}
}

func TestRetryAfterIsHonoured(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	pushed(t, newClient(t), r.Host()+"/a/b:c", 10)
	r.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/manifests/", Times: 1, Status: 429, RetryAfter: "1"})
	c := newClient(t, func(o *registry.Options) {
		o.Retry = registry.Retry{Tries: 2, Base: time.Millisecond, Max: time.Minute}
	})
	start := time.Now()
	resolve(t, c, r.Host()+"/a/b:c")
	if d := time.Since(start); d < time.Second {
		t.Errorf("came back after %s", d)
	}
}

func TestDownloadsResume(t *testing.T) {
	img := newImage(t, amd64, 3<<20)
	want := img.layers[0]
	for name, ranges := range map[string]bool{"ranges": true, "no ranges": false} {
		t.Run(name, func(t *testing.T) {
			r := registrytest.New(t, registrytest.Options{})
			pushedImage(t, r, img)
			var mu sync.Mutex
			var got []string
			r.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/", Serve: func(w http.ResponseWriter, req *http.Request, next http.Handler) {
				mu.Lock()
				got = append(got, req.Header.Get("Range"))
				n := len(got)
				mu.Unlock()
				if !ranges {
					req.Header.Del("Range")
				}
				if n < 4 {
					w = &breaking{ResponseWriter: w, left: int64(n) * 500_000}
				}
				next.ServeHTTP(w, req)
			}})
			b, err := fetch(t.Context(), newClient(t), image.Layer{Blob: img.doc.Layers[0], Origin: r.Host() + "/a/b"})
			if err != nil || !bytes.Equal(b, want) {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
			if len(got) != 4 || got[0] != "" || !strings.HasPrefix(got[3], "bytes=") {
				t.Errorf("asked for %q", got)
			}
		})
	}
}

// breaking breaks the connection after so many bytes.
type breaking struct {
	http.ResponseWriter
	left int64
}

func (b *breaking) Write(p []byte) (int, error) {
	if int64(len(p)) < b.left {
		b.left -= int64(len(p))
		return b.ResponseWriter.Write(p)
	}
	_, _ = b.ResponseWriter.Write(p[:b.left])
	_ = http.NewResponseController(b.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

// A download that makes way may break more often than a request is tried.
func TestLongDownloadsMayBreakOften(t *testing.T) {
	img := newImage(t, amd64, 12<<20)
	r := registrytest.New(t, registrytest.Options{})
	pushedImage(t, r, img)
	r.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/", Times: 8, Truncate: true, After: 1200 << 10})
	b, err := fetch(t.Context(), newClient(t), image.Layer{Blob: img.doc.Layers[0], Origin: r.Host() + "/a/b"})
	if err != nil || !bytes.Equal(b, img.layers[0]) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	if n := r.Counts().Failed; n != 8 {
		t.Errorf("broke %d times", n)
	}
}

func TestSlowReaderIsNoStall(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	img := pushed(t, newClient(t), r.Host()+"/a/b:c", 8<<20)
	c := newClient(t, func(o *registry.Options) { o.StallTimeout = 100 * time.Millisecond })
	rc, err := c.Fetch(t.Context(), image.Layer{Blob: img.doc.Layers[0], Origin: r.Host() + "/a/b"})
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	time.Sleep(300 * time.Millisecond)
	r.Fail(registrytest.Fault{Method: http.MethodGet, Path: "/blobs/", Status: 500}) // no second chance
	b, err := io.ReadAll(rc)
	if err != nil || !bytes.Equal(b, img.layers[0]) {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	// Nor is a slow source of an upload.
	r.Heal()
	slow := func() (io.ReadCloser, error) {
		pr, pw := io.Pipe()
		go func() {
			for _, part := range [][]byte{img.layers[0][:100], img.layers[0][100:]} {
				time.Sleep(300 * time.Millisecond)
				_, _ = pw.Write(part)
			}
			_ = pw.Close()
		}()
		return pr, nil
	}
	r.Fail(registrytest.Fault{Method: http.MethodPut, Skip: 1, Status: 500})
	p := pusher(t, c, r.Host()+"/c/d:e")
	if _, err := p.Blob(t.Context(), img.doc.Layers[0], "", slow, nil); err != nil {
		t.Error(err)
	}
}

func TestTokensAreRenewed(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{User: "ann", Password: "pw", Token: true})
	c := newClient(t, as("ann", "pw"))
	ref := r.Host() + "/a/b:c"
	p := pusher(t, c, ref)
	img := newImage(t, amd64, 1<<20)
	// The token is refused when the whole body was sent already.
	r.Fail(registrytest.Fault{Method: http.MethodPut, Path: "/blobs/", Times: 1, Serve: func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		_, _ = io.Copy(io.Discard, req.Body)
		r.RevokeTokens()
		next.ServeHTTP(w, req)
	}})
	img.push(t, p)
	r.RevokeTokens()
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageManifest, img.manifest); err != nil {
		t.Fatal(err)
	}
	r.RevokeTokens()
	got := resolve(t, c, ref)
	r.RevokeTokens()
	if _, err := fetch(t.Context(), c, got.Layers[0]); err != nil {
		t.Error(err)
	}
}

func TestBlobSourceMustBeAsDescribed(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	b := noise(t, 10_000)
	desc := describe("", b)
	changed := bytes.Clone(b)
	changed[5] ^= 1
	for name, c := range map[string]struct {
		open func() (io.ReadCloser, error)
		want string
	}{
		"short":   {opener(b[1:]), "10000 bytes"},
		"long":    {opener(append(bytes.Clone(b), 1)), "10000 bytes"},
		"changed": {opener(changed), "the blob here has digest"},
		"absent":  {func() (io.ReadCloser, error) { return nil, errors.New("no such file") }, "no such file"},
		"broken": {func() (io.ReadCloser, error) {
			return io.NopCloser(io.MultiReader(bytes.NewReader(b[:5000]), &failing{errors.New("disk on fire")})), nil
		}, "disk on fire"},
	} {
		t.Run(name, func(t *testing.T) {
			p := pusher(t, newClient(t), r.Host()+"/a/"+name)
			_, err := p.Blob(t.Context(), desc, "", c.open, nil)
			wantError(t, err, c.want)
		})
	}
	p := pusher(t, newClient(t), r.Host()+"/a/b:c")
	if _, err := p.Blob(t.Context(), desc, "", opener(b), nil); err != nil {
		t.Error(err)
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

func TestBlobsAreSentOnceAndFewAtATime(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	var now, most atomic.Int32
	r.Fail(registrytest.Fault{Method: http.MethodPut, Path: "/blobs/", Serve: func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		n := now.Add(1)
		defer now.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(20 * time.Millisecond)
		next.ServeHTTP(w, req)
	}})
	p := pusher(t, newClient(t, func(o *registry.Options) { o.Parallel = 3; o.StallTimeout = time.Minute }), r.Host()+"/a/b:c")
	blobs := make([][]byte, 12)
	var opened, uploaded atomic.Int32
	var wg sync.WaitGroup
	for i := range blobs {
		if i%2 == 0 {
			blobs[i] = noise(t, 1000)
		} else {
			blobs[i] = blobs[i-1]
		}
		wg.Go(func() {
			var last int64
			res, err := p.Blob(t.Context(), describe("", blobs[i]), "", func() (io.ReadCloser, error) {
				opened.Add(1)
				return opener(blobs[i])()
			}, func(n int64) { last = n })
			if err != nil {
				t.Error(err)
			}
			if res.Outcome == registry.Uploaded {
				uploaded.Add(1)
				if last != 1000 || res.Bytes != 1000 {
					t.Errorf("progress ended at %d, result %+v", last, res)
				}
			}
		})
	}
	wg.Wait()
	if opened.Load() != 6 || uploaded.Load() != 6 {
		t.Errorf("opened %d, uploaded %d of 6", opened.Load(), uploaded.Load())
	}
	if most.Load() > 3 {
		t.Errorf("%d at once", most.Load())
	}
}

// Copies from a registry to itself must not wait for each other for ever.
func TestCopyWithinRegistry(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	c := newClient(t, func(o *registry.Options) { o.Parallel = 2; o.StallTimeout = 10 * time.Second })
	img := pushed(t, c, r.Host()+"/a/b:c", 1000, 2000, 3000, 4000, 5000)
	p := pusher(t, c, r.Host()+"/c/d:e")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	for _, desc := range img.doc.Layers {
		wg.Go(func() {
			_, err := p.Blob(ctx, desc, "", func() (io.ReadCloser, error) {
				return c.Fetch(ctx, image.Layer{Blob: desc, Origin: r.Host() + "/a/b"})
			}, nil)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestRegistryThatTakesButDoesNotKeep(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	b := noise(t, 1000)
	for name, c := range map[string]struct{ header, want string }{
		"other digest": {digest.FromString("x").String(), "took the blob as"},
		"no digest":    {"", "does not have it"},
	} {
		t.Run(name, func(t *testing.T) {
			r.Heal()
			p := pusher(t, newClient(t), r.Host()+"/a/b:c")
			r.Fail(registrytest.Fault{Method: http.MethodPut, Serve: func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
				_, _ = io.Copy(io.Discard, req.Body)
				if c.header != "" {
					w.Header().Set("Docker-Content-Digest", c.header)
				}
				w.WriteHeader(http.StatusCreated)
			}})
			_, err := p.Blob(t.Context(), describe("", b), "", opener(b), nil)
			wantError(t, err, c.want)
		})
	}
	// A registry that does not say the digest, but has the blob, is believed.
	r.Heal()
	r.Fail(registrytest.Fault{Method: http.MethodPut, Serve: func(w http.ResponseWriter, req *http.Request, next http.Handler) {
		next.ServeHTTP(&without{ResponseWriter: w, header: "Docker-Content-Digest"}, req)
	}})
	pushed(t, newClient(t), r.Host()+"/a/b:c", 100)
}

// without answers without one header.
type without struct {
	http.ResponseWriter
	header string
}

func (w *without) WriteHeader(code int) {
	w.Header().Del(w.header)
	w.ResponseWriter.WriteHeader(code)
}

func TestTagIsLastAndOfTheDigestNamed(t *testing.T) {
	r := registrytest.New(t, registrytest.Options{})
	img := newImage(t, amd64, 10)
	p := pusher(t, newClient(t), r.Host()+"/a/b:c")
	d := img.push(t, p)
	_, err := newClient(t).Resolve(t.Context(), r.Host()+"/a/b:c", amd64)
	wantError(t, err, "404 Not Found")
	resolve(t, newClient(t), r.Host()+"/a/b@"+d.String())

	other := digest.FromString("other").String()
	p = pusher(t, newClient(t), r.Host()+"/a/b@"+other)
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageManifest, img.manifest); err == nil || !strings.Contains(err.Error(), d.String()) {
		t.Errorf("a tag with another digest: %v", err)
	}
	p = pusher(t, newClient(t), r.Host()+"/a/b@"+d.String())
	if err := p.Tag(t.Context(), ocispec.MediaTypeImageManifest, img.manifest); err != nil {
		t.Error(err)
	}
}

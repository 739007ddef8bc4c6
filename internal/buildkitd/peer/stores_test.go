package peer

import (
	"archive/tar"
	"bytes"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestPutBlobs puts a layout's archive into a store: the blobs alone, and none with a false name.
func TestPutBlobs(t *testing.T) {
	archive := func(files map[string]string) *bytes.Buffer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for name, data := range files {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o644}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte(data)); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return &b
	}
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	one, two := digest.FromString("one"), digest.FromString("two")
	for range 2 { // the second time they are there
		if err := putBlobs(t.Context(), store, archive(map[string]string{
			"oci-layout": "{}", "blobs/sha256/" + one.Encoded(): "one", "blobs/sha256/" + two.Encoded(): "two",
		})); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	if err := store.Walk(t.Context(), func(content.Info) error { n++; return nil }); err != nil || n != 2 {
		t.Errorf("%d blobs, %v", n, err)
	}
	if b, err := content.ReadBlob(t.Context(), store, ocispec.Descriptor{Digest: two, Size: 3}); err != nil || string(b) != "two" {
		t.Errorf("%q, %v", b, err)
	}
	three := digest.FromString("three")
	if err := putBlobs(t.Context(), store, archive(map[string]string{"blobs/sha256/" + three.Encoded(): "not three"})); err == nil {
		t.Error("a blob with the name of another was put")
	}
}

package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/layer"
	"github.com/kiln-build/kiln/internal/store"
	"github.com/kiln-build/kiln/internal/tree"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// canonical writes a layer as Kiln's own steps do.
func canonical(files ...string) func(w io.Writer) error {
	return func(w io.Writer) error {
		tw := layer.NewTarWriter(w)
		for _, name := range files {
			content := strings.Repeat("content of "+name+"\n", 1000)
			n := tree.Node{Mode: tree.ModeRegular | 0o644, Size: int64(len(content)), MTime: time.Unix(1e9, 5)}
			if err := tw.Add(name, n, "", func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil }); err != nil {
				return err
			}
		}
		return tw.Close()
	}
}

func TestCommit(t *testing.T) {
	ctx := context.Background()
	var raw bytes.Buffer
	if err := canonical("a", "b")(&raw); err != nil {
		t.Fatal(err)
	}
	for _, c := range []layer.Compression{"", layer.Gzip, layer.Zstd} {
		t.Run(string(c), func(t *testing.T) {
			st := newStore(t)
			l := must(Commit(ctx, st, CommitOptions{Compression: c}, canonical("a", "b")))(t)
			if l.DiffID != digest.FromBytes(raw.Bytes()) || !st.HasLayer(l.DiffID) {
				t.Fatalf("layer %+v", l)
			}
			if s := readFile(t, st, l.DiffID, "b"); !strings.HasPrefix(s, "content of b") {
				t.Errorf("content %.20q", s)
			}
			if c == "" {
				if l.Blob.Digest != "" {
					t.Errorf("blob %+v", l.Blob)
				}
				return
			}
			blob := must(st.ReadBlob(l.Blob.Digest, 1<<20))(t)
			z := must(layer.Decompress(bytes.NewReader(blob)))(t)
			if b := must(io.ReadAll(z))(t); !bytes.Equal(b, raw.Bytes()) || l.Blob.MediaType != layer.MediaType(c) || l.Blob.Size != int64(len(blob)) {
				t.Errorf("blob %+v", l.Blob)
			}
			// Made later, it is the same.
			st2 := newStore(t)
			later := must(Commit(ctx, st2, CommitOptions{}, canonical("a", "b")))(t)
			if later = must(Pack(ctx, st2, later, c, 0))(t); later.Blob.Digest != l.Blob.Digest {
				t.Errorf("packed later it is %s, at once %s", later.Blob.Digest, l.Blob.Digest)
			}
		})
	}
}

func TestCommitFails(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	why := errors.New("the step failed")
	for name, write := range map[string]func(io.Writer) error{
		"at once": func(io.Writer) error { return why },
		"at the end": func(w io.Writer) error {
			if err := canonical("a")(w); err != nil {
				return err
			}
			return why
		},
	} {
		if _, err := Commit(ctx, st, CommitOptions{Compression: layer.Gzip}, write); !errors.Is(err, why) {
			t.Errorf("%s: error is %v", name, err)
		}
		nothingIn(t, st)
	}
	if _, err := Commit(ctx, st, CommitOptions{Compression: "lzma"}, canonical("a")); err == nil {
		t.Error("unknown compression was taken")
	}
	if _, err := Commit(ctx, st, CommitOptions{}, func(w io.Writer) error {
		_, err := io.WriteString(w, strings.Repeat("no tar", 1_000_000))
		return err
	}); err == nil {
		t.Error("rubbish was committed")
	}
	nothingIn(t, st)
}

func TestPack(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	bare := must(Commit(ctx, st, CommitOptions{}, canonical("a")))(t)
	bare.Created = time.Unix(5, 0)
	gz := must(Pack(ctx, st, bare, layer.Gzip, 0))(t)
	if gz.Blob.Digest == "" || gz.DiffID != bare.DiffID || !gz.Created.Equal(bare.Created) {
		t.Fatalf("packed: %+v", gz)
	}
	// Never twice: not even when the layer file is gone.
	if err := st.DropLayer(bare.DiffID); err != nil {
		t.Fatal(err)
	}
	if again := must(Pack(ctx, st, bare, layer.Gzip, 0))(t); again.Blob.Digest != gz.Blob.Digest || !again.Created.Equal(bare.Created) {
		t.Errorf("packed again: %+v", again)
	}
	// The other compression is not made, unless one insists.
	for _, l := range []Layer{bare, gz} {
		if kept := must(Pack(ctx, st, l, layer.Zstd, 0))(t); kept.Blob.Digest != gz.Blob.Digest {
			t.Errorf("kept: %+v", kept)
		}
	}
	zst := must(Repack(ctx, st, gz, layer.Zstd, 0))(t)
	if zst.Blob.MediaType != layer.MediaType(layer.Zstd) {
		t.Errorf("forced: %+v", zst)
	}
	if same := must(Repack(ctx, st, gz, layer.Gzip, 0))(t); same.Blob.Digest != gz.Blob.Digest {
		t.Errorf("forced, but was so: %+v", same)
	}
	best := must(Repack(ctx, st, gz, layer.Gzip, 9))(t)
	if again := must(Repack(ctx, st, bare, layer.Gzip, 9))(t); again.Blob.Digest != best.Blob.Digest {
		t.Errorf("level 9 is %s, and then %s", best.Blob.Digest, again.Blob.Digest)
	}
	// What a build made does not depend on what else the store has.
	if fresh := must(PackNew(ctx, st, best, layer.Gzip, 0))(t); fresh.Blob.Digest != gz.Blob.Digest {
		t.Errorf("a new layer is %s, and %s in another store", fresh.Blob.Digest, gz.Blob.Digest)
	}
	plain := must(PackNew(ctx, st, gz, layer.Uncompressed, 0))(t)
	if plain.Blob.Digest != bare.DiffID || plain.Blob.MediaType != ocispec.MediaTypeImageLayer {
		t.Errorf("uncompressed: %+v", plain)
	}
	if again := must(Pack(ctx, st, bare, layer.Gzip, 0))(t); again.Blob.MediaType != gz.Blob.MediaType {
		t.Errorf("a plain tar is taken for a compressed one: %+v", again)
	}
	if _, err := Pack(ctx, st, Layer{DiffID: digest.FromString("gone")}, layer.Gzip, 0); err == nil || !strings.Contains(err.Error(), "no form of it") {
		t.Errorf("packing what is not there gave %v", err)
	}
}

// What another tool wrote cannot be written again from the layer file.
func TestPackForeignTar(t *testing.T) {
	st, ctx := newStore(t), context.Background()
	l, r := layerOf(t, makeTar(t, map[string]string{"f": "x"}), "")
	must(Unpack(ctx, st, l, r, nil))(t)
	packed := must(Pack(ctx, st, l, layer.Gzip, 0))(t) // from the uncompressed blob
	if packed.Blob.MediaType != layer.MediaType(layer.Gzip) || packed.Origin != "" {
		t.Errorf("packed: %+v", packed)
	}
	st2 := newStore(t)
	must(Unpack(ctx, st2, l, r, nil))(t)
	// Only the layer file is left.
	removeBlob(t, st2, l.Blob.Digest)
	_, err := Pack(ctx, st2, Layer{DiffID: l.DiffID}, layer.Gzip, 0)
	if err == nil || !strings.Contains(err.Error(), "another tool") {
		t.Errorf("error is %v", err)
	}
}

func removeBlob(t testing.TB, st *store.Store, d digest.Digest) {
	t.Helper()
	if err := os.Remove(filepath.Join(st.Root(), "blobs/sha256", d.Encoded())); err != nil {
		t.Fatal(err)
	}
}

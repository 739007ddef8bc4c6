package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/kiln-build/kiln/internal/store"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// kindBlobs are the records that note which blobs a layer has, by diff ID.
const kindBlobs = store.LinkKind + "layer-blobs"

// knownBlob is a compressed form of a layer.
type knownBlob struct {
	Descriptor  ocispec.Descriptor `json:"descriptor"`
	Compression string             `json:"compression"`
	Level       int                `json:"level,omitempty"` // if Kiln made it
	Ours        bool               `json:"ours,omitempty"`  // Kiln made it
}

// knownBlobs returns the blobs of a layer that are in the store.
func knownBlobs(st *store.Store, diffID digest.Digest) ([]knownBlob, error) {
	b, err := st.GetRecord(kindBlobs, string(diffID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all, have []knownBlob
	if json.Unmarshal(b, &all) != nil {
		return nil, nil
	}
	for _, k := range all {
		if n, err := st.StatBlob(k.Descriptor.Digest); err == nil && n == k.Descriptor.Size {
			have = append(have, k)
		}
	}
	return have, nil
}

// noteBlob remembers a blob of a layer. The caller holds the layer's lock, but
// losing a note does no harm: the blob is made again.
func noteBlob(st *store.Store, diffID digest.Digest, k knownBlob) error {
	have, err := knownBlobs(st, diffID)
	if err != nil {
		return err
	}
	k.Descriptor = ocispec.Descriptor{
		MediaType: k.Descriptor.MediaType, Digest: k.Descriptor.Digest, Size: k.Descriptor.Size, Annotations: k.Descriptor.Annotations,
	}
	keep := []knownBlob{k}
	for _, o := range have {
		if len(keep) == 8 {
			break
		}
		if o.Descriptor.Digest == k.Descriptor.Digest {
			if !k.Ours {
				return nil
			}
			continue
		}
		keep = append(keep, o)
	}
	b, err := json.Marshal(keep)
	if err != nil {
		return err
	}
	return st.PutRecord(kindBlobs, string(diffID), b)
}

// hasBlob reports whether the store has the blob that d describes.
func hasBlob(st *store.Store, d ocispec.Descriptor) bool {
	n, err := st.StatBlob(d.Digest)
	return err == nil && n == d.Size
}

func layerLock(diffID digest.Digest) string { return fmt.Sprintf("layer %s", diffID) }

// Fetch makes sure that the store has the compressed blob of a layer, verified,
// without unpacking it. f may be nil if the store must have it.
func Fetch(ctx context.Context, st *store.Store, l Layer, f Fetcher) error {
	if err := checkDescriptor("fetch layer", l.Blob); err != nil {
		return err
	}
	if hasBlob(st, l.Blob) {
		return nil
	}
	if f == nil {
		return fmt.Errorf("layer %s: its blob is not in the store: %w", l.Blob.Digest, &LostError{l, fs.ErrNotExist})
	}
	unlock, err := st.Lock(ctx, "blob "+string(l.Blob.Digest))
	if err != nil {
		return err
	}
	defer unlock()
	if hasBlob(st, l.Blob) {
		return nil
	}
	r, err := f.Fetch(ctx, l)
	if err != nil {
		return fmt.Errorf("fetch layer %s: %w", l.Blob.Digest, lost(l, err))
	}
	defer r.Close()
	w, err := st.NewBlob()
	if err != nil {
		return err
	}
	defer w.Close()
	if _, err := io.Copy(w, io.LimitReader(ctxReader{ctx, r}, l.Blob.Size+1)); err != nil {
		return fmt.Errorf("fetch layer %s: %w", l.Blob.Digest, lost(l, err))
	}
	if w.Size() != l.Blob.Size {
		err := fmt.Errorf("%w: its size is not the %d bytes that its manifest announces", store.ErrMismatch, l.Blob.Size)
		return fmt.Errorf("fetch layer %s: %w", l.Blob.Digest, lost(l, err))
	}
	if _, err = w.Commit(l.Blob.Digest); errors.Is(err, store.ErrMismatch) {
		err = lost(l, err)
	}
	return err
}

package peer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
)

// exportStore is what clients call the store that an image goes to with tar=false. There is but one.
const exportStore = "export"

// storeOutput puts an image's blobs into a store of the client, which writes the layout's index itself.
type storeOutput struct {
	*output
}

func (p *Peer) storeOutput(id int, s export.Spec) (*storeOutput, error) {
	c, err := p.caller(p.ctx, "")
	if err != nil {
		return nil, err
	}
	if !supports(c, contentapi.Content_ServiceDesc.ServiceName, "Write") {
		return nil, diag.New(diag.ExitUsage, "exporter %s: the client has no store for tar=false", s.Type)
	}
	return &storeOutput{&output{peer: p, id: id}}, nil
}

// File implements build.Destination: what is written is a layout as an archive.
func (o *storeOutput) File(ctx context.Context, _ map[string]string) (io.WriteCloser, error) {
	c, err := o.peer.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := putBlobs(ctx, sessioncontent.NewCallerStore(c, exportStore), r)
		r.CloseWithError(err)
		done <- err
	}()
	return &unpacking{PipeWriter: w, done: done}, nil
}

// unpacking is an archive that is being put into a store.
type unpacking struct {
	*io.PipeWriter
	done <-chan error
}

// Close waits until all blobs have arrived.
func (u *unpacking) Close() error {
	u.PipeWriter.Close()
	return <-u.done
}

// putBlobs puts the blobs of a layout's archive into a store, and reads the archive to its end.
func putBlobs(ctx context.Context, to content.Ingester, archive io.Reader) error {
	tr := tar.NewReader(archive)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			_, err := io.Copy(io.Discard, archive)
			return err
		}
		if err != nil {
			return err
		}
		hex, ok := strings.CutPrefix(h.Name, ocispec.ImageBlobsDir+"/sha256/")
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		d := ocispec.Descriptor{Digest: digest.NewDigestFromEncoded(digest.SHA256, hex), Size: h.Size}
		if err := content.WriteBlob(ctx, to, "kiln-"+hex, tr, d); err != nil {
			return fmt.Errorf("put blob %s into the client's store: %w", d.Digest, err)
		}
	}
}

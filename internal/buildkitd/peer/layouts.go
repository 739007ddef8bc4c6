package peer

import (
	"context"
	"errors"
	"fmt"
	"io"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/image"
)

// storeHeader names the store that a request is for, among those that a client offers.
const storeHeader = "buildkit-attachable-store-id"

// OpenLayout implements build.Layouts: the client calls the store of a layout "oci:NAME".
func (p *Peer) OpenLayout(ctx context.Context, name string) (build.Layout, error) {
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("OCI layout %q from the client: %w", name, err)
	}
	if !supports(c, contentapi.Content_ServiceDesc.ServiceName, "Read") {
		return nil, fmt.Errorf("OCI layout %q: the client offers none", name)
	}
	return &layout{name: name, caller: c, client: contentapi.NewContentClient(c.Conn())}, nil
}

// layout is an OCI layout that the client has.
type layout struct {
	name   string
	caller session.Caller
	client contentapi.ContentClient
}

// Resolve implements build.Layout. The client has looked tags up: there are digests alone.
func (l *layout) Resolve(ctx context.Context, d string, p ocispec.Platform) (*image.Image, error) {
	if err := digest.Digest(d).Validate(); err != nil {
		return nil, fmt.Errorf("OCI layout %q: digest %.100q: %w", l.name, d, err)
	}
	img, err := image.Resolve(ctx, l.document, ocispec.Descriptor{Digest: digest.Digest(d)}, p)
	if err != nil {
		return nil, fmt.Errorf("OCI layout %q: %w", l.name, err)
	}
	return img, nil
}

// document reads a manifest, index or config; image.Resolve verifies it.
func (l *layout) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	r := l.open(ctx, d.Digest)
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, image.MaxConfig+1))
	if err == nil && len(b) > image.MaxConfig {
		err = fmt.Errorf("it has more than %d bytes", image.MaxConfig)
	}
	return b, err
}

// Fetch implements image.Fetcher.
func (l *layout) Fetch(ctx context.Context, layer image.Layer) (io.ReadCloser, error) {
	if err := layer.Blob.Digest.Validate(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(l.with(ctx))
	defer cancel()
	if _, err := l.client.Info(ctx, &contentapi.InfoRequest{Digest: layer.Blob.Digest.String()}); err != nil {
		return nil, fmt.Errorf("blob %s in OCI layout %q: %w", layer.Blob.Digest, l.name, err)
	}
	return image.Verified(l.open(ctx, layer.Blob.Digest), layer.Blob), nil
}

func (l *layout) with(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(l.caller.Context(ctx), storeHeader, "oci:"+l.name)
}

// open streams a blob.
func (l *layout) open(ctx context.Context, d digest.Digest) io.ReadCloser {
	ctx, cancel := context.WithCancel(l.with(ctx))
	return &blob{ctx: ctx, cancel: cancel, layout: l, digest: d}
}

// blob reads what the client sends of a blob.
type blob struct {
	ctx    context.Context //nolint:containedctx // the request's
	cancel context.CancelFunc
	layout *layout
	digest digest.Digest
	stream grpc.ServerStreamingClient[contentapi.ReadContentResponse]
	rest   []byte
}

// Read implements io.Reader.
func (b *blob) Read(p []byte) (int, error) {
	if b.stream == nil {
		var err error
		if b.stream, err = b.layout.client.Read(b.ctx, &contentapi.ReadContentRequest{Digest: b.digest.String()}); err != nil {
			return 0, b.failed(err)
		}
	}
	for len(b.rest) == 0 {
		m, err := b.stream.Recv()
		if errors.Is(err, io.EOF) {
			return 0, io.EOF
		}
		if err != nil {
			return 0, b.failed(err)
		}
		b.rest = m.Data
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *blob) failed(err error) error {
	return fmt.Errorf("read blob %s of the client's OCI layout %q: %w", b.digest, b.layout.name, err)
}

// Close ends the transfer.
func (b *blob) Close() error {
	b.cancel()
	return nil
}

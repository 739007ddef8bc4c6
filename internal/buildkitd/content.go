package buildkitd

import (
	"context"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// noContent is what clients can read of the server's blobs: nothing. BuildKit has attestations, traces and logs of
// past builds there, which no record of the history here refers to. The store's own blobs are not the clients'.
type noContent struct {
	contentapi.UnimplementedContentServer
}

// List implements contentapi.ContentServer.
func (noContent) List(*contentapi.ListContentRequest, contentapi.Content_ListServer) error {
	return nil
}

// Info implements contentapi.ContentServer.
func (noContent) Info(_ context.Context, req *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	return nil, noBlob(req.Digest)
}

// Read implements contentapi.ContentServer.
func (noContent) Read(req *contentapi.ReadContentRequest, _ contentapi.Content_ReadServer) error {
	return noBlob(req.Digest)
}

func noBlob(digest string) error {
	return status.Errorf(codes.NotFound, "content %.100q: not found", digest)
}

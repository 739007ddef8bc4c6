package peer

import (
	"errors"
	"io"
	"net/http"

	"github.com/moby/buildkit/session/upload"
)

// RoundTrip implements http.RoundTripper for what the client sends itself: an archive that is its context
// ("docker buildx build - < context.tar"), under a URL of the host remote.UploadHost. The answer can be read once.
func (p *Peer) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method != http.MethodGet {
		return nil, errors.New("only GET is possible")
	}
	ctx := req.Context()
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	up, err := upload.New(ctx, c, req.URL)
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	go func() {
		_, err := up.WriteTo(w)
		w.CloseWithError(err)
	}()
	return &http.Response{Status: "200 OK", StatusCode: http.StatusOK, Request: req, Header: http.Header{}, Body: r, ContentLength: -1}, nil
}

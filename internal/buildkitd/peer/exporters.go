package peer

import (
	"context"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session/exporter"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
)

// FindExporters asks the client where the result is to go, now that there is one: metadata is what is
// said about it, and refs name its parts.
func (p *Peer) FindExporters(ctx context.Context, metadata map[string][]byte, refs []string) ([]*controlapi.Exporter, error) {
	c, err := p.caller(ctx, "")
	if err != nil {
		return nil, err
	}
	res, err := exporter.NewExporterClient(c.Conn()).FindExporters(c.Context(ctx), &exporter.FindExportersRequest{Metadata: metadata, Refs: refs})
	if err != nil {
		return nil, optional(err)
	}
	var out []*controlapi.Exporter
	for _, e := range res.Exporters {
		out = append(out, &controlapi.Exporter{Type: e.Type, Attrs: e.Attrs})
	}
	return out, nil
}

// FinalizeExport tells the client what the result is called.
func (p *Peer) FinalizeExport(ctx context.Context, response map[string]string) error {
	c, err := p.caller(ctx, "")
	if err != nil {
		return err
	}
	_, err = exporter.NewExporterClient(c.Conn()).FinalizeExport(c.Context(ctx), &exporter.FinalizeExportRequest{ExporterResponse: response})
	return optional(err)
}

// optional is err, unless it says that the client does not do this.
func optional(err error) error {
	if code := grpcerrors.Code(err); code == codes.Unimplemented || code == codes.Unavailable {
		return nil
	}
	return err
}

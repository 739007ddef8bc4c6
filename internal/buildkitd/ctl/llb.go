package ctl

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"

	"github.com/kiln-build/kiln/internal/frontend"
)

// DumpLLB writes the operations of a graph as BuildKit's buildctl does: one JSON object a line.
func DumpLLB(w io.Writer, def *frontend.Definition) error {
	enc := json.NewEncoder(w)
	for _, b := range def.Def {
		op := &pb.Op{}
		if err := op.UnmarshalVT(b); err != nil {
			return fmt.Errorf("read an operation: %w", err)
		}
		d := digest.FromBytes(b)
		if err := enc.Encode(struct {
			Op         *pb.Op
			Digest     digest.Digest
			OpMetadata *pb.OpMetadata
		}{op, d, def.Metadata[string(d)]}); err != nil {
			return err
		}
	}
	return nil
}

package frontend

import (
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/moby/buildkit/solver/pb"
)

// maxDefinition bounds a graph that somebody sends, in bytes, as BuildKit's API does.
const maxDefinition = 16 << 20

// ReadDefinition reads a graph as BuildKit's clients write it. anew: none of its steps
// takes its result from the cache.
func ReadDefinition(r io.Reader, anew bool) (*Definition, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxDefinition+1))
	if err == nil && len(b) > maxDefinition {
		err = fmt.Errorf("it has more than %d bytes", maxDefinition)
	}
	if err != nil {
		return nil, fmt.Errorf("read the LLB definition: %w", err)
	}
	def := &Definition{}
	if err := def.UnmarshalVT(b); err != nil {
		return nil, fmt.Errorf("read the LLB definition: %w", err)
	}
	if len(def.Def) == 0 {
		return nil, errors.New("the LLB definition is empty")
	}
	if !anew {
		return def, nil
	}
	if def.Metadata == nil {
		def.Metadata = map[string]*pb.OpMetadata{}
	}
	for _, op := range def.Def {
		d := digest.FromBytes(op).String()
		if def.Metadata[d] == nil {
			def.Metadata[d] = &pb.OpMetadata{}
		}
		def.Metadata[d].IgnoreCache = true
	}
	return def, nil
}

package frontend

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source/git"
	"github.com/kiln-build/kiln/internal/source/http"
	"github.com/kiln-build/kiln/internal/source/remote"
)

// ResolveSource finds out what a source is, without fetching more of it than was asked for.
func ResolveSource(ctx context.Context, sources Sources, rec *progress.Recorder, op *pb.SourceOp, opt sourceresolver.Opt) (_ *sourceresolver.MetaResponse, err error) {
	kind, ref, _ := strings.Cut(op.GetIdentifier(), "://")
	name := ref
	switch kind {
	case "http", "https":
		name = http.Redact(op.Identifier)
	case "git":
		name = strings.TrimPrefix(git.Redact(op.Identifier), "git://")
	}
	step := rec.Step("[internal] load metadata for "+name, "")
	step.Start()
	defer func() { step.Done(err) }()
	res := &sourceresolver.MetaResponse{Op: op}
	switch kind {
	case "docker-image", "oci-layout":
		res.Image, err = resolveImage(ctx, sources, kind, ref, op, opt)
	case "http", "https", "git":
		err = describe(ctx, sources, op, opt, res)
	case "local": // nothing is known of it
	default:
		err = fmt.Errorf("sources of kind %q are not supported", kind)
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}

// PlatformOf is the platform that a source is resolved for; nil if nobody says.
func PlatformOf(opt sourceresolver.Opt) *pb.Platform {
	var p *ocispec.Platform
	if opt.ImageOpt != nil {
		p = opt.ImageOpt.Platform
	}
	if p == nil && opt.OCILayoutOpt != nil {
		p = opt.OCILayoutOpt.Platform
	}
	if p == nil {
		return nil
	}
	return pb.PlatformFromSpec(*p)
}

func resolveImage(ctx context.Context, sources Sources, kind, ref string, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.ResolveImageResponse, error) {
	var (
		p   *ocispec.Platform
		img *image.Image
		err error
	)
	if o := opt.ImageOpt; o != nil && kind == "docker-image" {
		p = o.Platform
	}
	if o := opt.OCILayoutOpt; o != nil && kind == "oci-layout" {
		p = o.Platform
	}
	if p == nil {
		d := platforms.DefaultSpec()
		p = &d
	}
	if kind == "docker-image" {
		img, err = sources.Resolve(ctx, ref, *p)
	} else {
		_, d, _ := strings.Cut(ref, "@")
		img, err = sources.ResolveLayout(ctx, op.Attrs[pb.AttrOCILayoutStoreID], digest.Digest(d), *p)
	}
	if err != nil {
		return nil, err
	}
	return &sourceresolver.ResolveImageResponse{Digest: img.Digest, Config: img.RawConfig}, nil
}

// describe fills in what is known of a remote source.
func describe(ctx context.Context, sources Sources, op *pb.SourceOp, opt sourceresolver.Opt, res *sourceresolver.MetaResponse) error {
	ask := remote.Ask{Objects: opt.GitOpt != nil && opt.GitOpt.ReturnObject}
	if o := opt.HTTPOpt; o != nil && o.ChecksumReq != nil {
		var err error
		if ask.Algorithm, err = algorithm(o.ChecksumReq.Algo); err != nil {
			return err
		}
		if ask.Suffix = o.ChecksumReq.Suffix; len(ask.Suffix) > maxSuffix {
			return fmt.Errorf("the suffix of a checksum has %d bytes: more than %d are refused", len(ask.Suffix), maxSuffix)
		}
	}
	md, err := sources.Describe(ctx, op.Identifier, op.Attrs, ask)
	if err != nil {
		return err
	}
	if g := md.Git; g != nil {
		res.Git = &sourceresolver.ResolveGitResponse{
			Checksum: g.Hash, Ref: g.Ref, CommitChecksum: g.Peeled, CommitObject: g.Commit, TagObject: g.Tag,
		}
		if g.Ref == "" { // a commit, by its hash
			res.Git.Ref = g.Hash
		}
	}
	if h := md.HTTP; h != nil {
		res.HTTP = &sourceresolver.ResolveHTTPResponse{Digest: h.Digest, Filename: h.Filename}
		if !h.LastModified.IsZero() {
			res.HTTP.LastModified = &h.LastModified
		}
		if h.Checksum != "" {
			res.HTTP.ChecksumResponse = &sourceresolver.ResolveHTTPChecksumResponse{Digest: h.Checksum.String(), Suffix: ask.Suffix}
		}
	}
	return nil
}

// maxSuffix is BuildKit's bound on what a checksum is computed with.
const maxSuffix = 4 << 10

func algorithm(a sourceresolver.ResolveHTTPChecksumAlgo) (digest.Algorithm, error) {
	switch a {
	case sourceresolver.ResolveHTTPChecksumAlgoSHA256:
		return digest.SHA256, nil
	case sourceresolver.ResolveHTTPChecksumAlgoSHA384:
		return digest.SHA384, nil
	case sourceresolver.ResolveHTTPChecksumAlgoSHA512:
		return digest.SHA512, nil
	}
	return "", fmt.Errorf("the checksum algorithm %d is not supported", a)
}

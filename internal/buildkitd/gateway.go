package buildkitd

import (
	"context"
	"fmt"
	"slices"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client/buildid"
	"github.com/moby/buildkit/client/llb/sourceresolver"
	gwclient "github.com/moby/buildkit/frontend/gateway/client"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	apicapspb "github.com/moby/buildkit/util/apicaps/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kiln-build/kiln/internal/frontend"
)

// gateway is the service that clients which build with a front end of their own ask for definitions to
// be computed, files of results and metadata of sources. Each request names its build in a header.
type gateway struct {
	gatewayapi.UnimplementedLLBBridgeServer
	jobs   *jobs
	worker *worker
}

// bridge finds the build that a request is for. The context that it returns ends with that build,
// too; end must be called.
func (g *gateway) bridge(ctx context.Context) (b *bridge, bctx context.Context, end func(), err error) {
	id := buildid.FromIncomingContext(ctx)
	if id == "" {
		return nil, nil, nil, status.Error(codes.InvalidArgument, "no buildid found in context")
	}
	j, err := g.jobs.find(ctx, id, caller(ctx))
	if err != nil {
		return nil, nil, nil, err
	}
	switch b = j.bridge; {
	case j.ended && j.err != nil:
		return nil, nil, nil, j.err
	case j.ended:
		return nil, nil, nil, status.Error(codes.Unavailable, "the build has ended")
	case b == nil:
		return nil, nil, nil, status.Errorf(codes.FailedPrecondition, "build %s has a front end on the server", id)
	}
	if bctx, end, err = b.enter(ctx); err != nil {
		return nil, nil, nil, err
	}
	if err := b.wait(bctx); err != nil {
		end()
		return nil, nil, nil, err
	}
	return b, bctx, end, nil
}

// Ping implements gatewayapi.LLBBridgeServer.
func (g *gateway) Ping(ctx context.Context, _ *gatewayapi.PingRequest) (*gatewayapi.PongResponse, error) {
	_, _, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return &gatewayapi.PongResponse{
		FrontendAPICaps: gatewayCaps(), LLBCaps: pb.Caps.All(), Workers: []*apitypes.WorkerRecord{g.worker.record()},
	}, nil
}

// gatewayCaps are those of the gateway that are there.
func gatewayCaps() []*apicapspb.APICap {
	missing := map[apicaps.CapID]string{
		gatewayapi.CapGatewayExec:                         noContainers,
		gatewayapi.CapGatewayExecExtraHosts:               noContainers,
		gatewayapi.CapGatewayExecSecretEnv:                noContainers,
		gatewayapi.CapGatewayExecSignals:                  noContainers,
		gatewayapi.CapGatewayExecFilesystem:               noContainers,
		gatewayapi.CapAttestations:                        "attestations are not supported",
		gatewayapi.CapSourceMetaResolverImageAttestations: "attestations are not supported",
	}
	all := gatewayapi.Caps.All()
	for _, c := range all {
		if why, ok := missing[apicaps.CapID(c.ID)]; ok {
			c.Enabled, c.DisabledReason, c.DisabledReasonMsg = false, "unsupported", why
		}
	}
	return all
}

const noContainers = "containers outside of a build's steps are not supported"

// Solve implements gatewayapi.LLBBridgeServer.
func (g *gateway) Solve(ctx context.Context, req *gatewayapi.SolveRequest) (*gatewayapi.SolveResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if req.Final || !req.AllowResultReturn {
		return nil, status.Error(codes.Unimplemented, "clients from before results could be returned are not supported")
	}
	if err := b.run.useCaches(req.CacheImports); err != nil {
		return nil, err
	}
	policy, err := b.run.policy.With(req.SourcePolicies)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	res, err := b.run.solve(ctx, request{
		Definition: req.Definition, Frontend: req.Frontend, Attrs: req.FrontendOpt, Inputs: req.FrontendInputs, Evaluate: req.Evaluate,
		Policy: policy,
	})
	if err != nil {
		return nil, ending(ctx, err)
	}
	out := &gatewayapi.Result{Metadata: res.Metadata}
	if res.Refs == nil {
		ref, err := b.register(res.Ref)
		if err != nil {
			return nil, err
		}
		out.Result = &gatewayapi.Result_Ref{Ref: ref}
		if !req.AllowResultArrayRef {
			out.Result = &gatewayapi.Result_RefDeprecated{RefDeprecated: ref.Id}
		}
		return &gatewayapi.SolveResponse{Result: out}, nil
	}
	refs, ids := map[string]*gatewayapi.Ref{}, map[string]string{}
	for k, def := range res.Refs {
		ref, err := b.register(def)
		if err != nil {
			return nil, err
		}
		refs[k], ids[k] = ref, ref.Id
	}
	out.Result = &gatewayapi.Result_Refs{Refs: &gatewayapi.RefMap{Refs: refs}}
	if !req.AllowResultArrayRef {
		out.Result = &gatewayapi.Result_RefsDeprecated{RefsDeprecated: &gatewayapi.RefMapDeprecated{Refs: ids}}
	}
	return &gatewayapi.SolveResponse{Result: out}, nil
}

// Return implements gatewayapi.LLBBridgeServer: the build is to end with this result, or error.
func (g *gateway) Return(ctx context.Context, req *gatewayapi.ReturnRequest) (*gatewayapi.ReturnResponse, error) {
	b, _, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if req.Error != nil {
		return &gatewayapi.ReturnResponse{}, b.finish(nil, grpcerrors.FromGRPC(status.ErrorProto(&spb.Status{
			Code: req.Error.Code, Message: req.Error.Message, Details: req.Error.Details,
		})))
	}
	res, err := b.result(req.Result)
	if err != nil {
		return nil, err
	}
	return &gatewayapi.ReturnResponse{}, b.finish(res, nil)
}

// Inputs implements gatewayapi.LLBBridgeServer.
func (g *gateway) Inputs(ctx context.Context, _ *gatewayapi.InputsRequest) (*gatewayapi.InputsResponse, error) {
	b, _, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	return &gatewayapi.InputsResponse{Definitions: b.inputs}, nil
}

// Evaluate implements gatewayapi.LLBBridgeServer.
func (g *gateway) Evaluate(ctx context.Context, req *gatewayapi.EvaluateRequest) (*gatewayapi.EvaluateResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	def, err := b.definition(req.Ref)
	if err != nil {
		return nil, err
	}
	return &gatewayapi.EvaluateResponse{}, ending(ctx, located(b.run.build.Evaluate(ctx, def), def))
}

// ReadFile implements gatewayapi.LLBBridgeServer.
func (g *gateway) ReadFile(ctx context.Context, req *gatewayapi.ReadFileRequest) (*gatewayapi.ReadFileResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	t, err := b.tree(ctx, req.Ref)
	if err != nil {
		return nil, ending(ctx, err)
	}
	r := gwclient.ReadRequest{Filename: req.FilePath}
	if req.Range != nil {
		r.Range = &gwclient.FileRange{Offset: int(req.Range.Offset), Length: int(req.Range.Length)}
	}
	data, err := frontend.ReadFile(t, r)
	return &gatewayapi.ReadFileResponse{Data: data}, err
}

// ReadDir implements gatewayapi.LLBBridgeServer.
func (g *gateway) ReadDir(ctx context.Context, req *gatewayapi.ReadDirRequest) (*gatewayapi.ReadDirResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	t, err := b.tree(ctx, req.Ref)
	if err != nil {
		return nil, ending(ctx, err)
	}
	entries, err := frontend.ReadDir(ctx, t, gwclient.ReadDirRequest{Path: req.DirPath, IncludePattern: req.IncludePattern})
	return &gatewayapi.ReadDirResponse{Entries: entries}, err
}

// StatFile implements gatewayapi.LLBBridgeServer.
func (g *gateway) StatFile(ctx context.Context, req *gatewayapi.StatFileRequest) (*gatewayapi.StatFileResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	t, err := b.tree(ctx, req.Ref)
	if err != nil {
		return nil, ending(ctx, err)
	}
	st, err := frontend.StatFile(t, gwclient.StatRequest{Path: req.Path})
	return &gatewayapi.StatFileResponse{Stat: st}, err
}

// ResolveSourceMeta implements gatewayapi.LLBBridgeServer.
func (g *gateway) ResolveSourceMeta(ctx context.Context, req *gatewayapi.ResolveSourceMetaRequest) (*gatewayapi.ResolveSourceMetaResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if req.Source == nil {
		return nil, status.Error(codes.InvalidArgument, "source is required")
	}
	opt := metaOptions(req)
	opt.SourcePolicies = req.SourcePolicies
	res, err := resolver{b.run}.ResolveSourceMetadata(ctx, req.Source, opt)
	if err != nil {
		return nil, ending(ctx, err)
	}
	return metaResponse(res), nil
}

// metaOptions are what is asked about a source.
func metaOptions(req *gatewayapi.ResolveSourceMetaRequest) sourceresolver.Opt {
	p := platformOf(req.Platform)
	opt := sourceresolver.Opt{
		LogName:      req.LogName,
		ImageOpt:     &sourceresolver.ResolveImageOpt{Platform: p, ResolveMode: req.ResolveMode, NoConfig: req.GetImage().GetNoConfig()},
		OCILayoutOpt: &sourceresolver.ResolveOCILayoutOpt{Platform: p},
		GitOpt:       &sourceresolver.ResolveGitOpt{ReturnObject: req.GetGit().GetReturnObject()},
	}
	if c := req.GetHTTP().GetChecksumRequest(); c != nil {
		opt.HTTPOpt = &sourceresolver.ResolveHTTPOpt{
			ChecksumReq: &sourceresolver.ResolveHTTPChecksumRequest{Algo: sourceresolver.ResolveHTTPChecksumAlgo(c.Algo), Suffix: c.Suffix},
		}
	}
	return opt
}

// metaResponse is an answer in the words of the API.
func metaResponse(res *sourceresolver.MetaResponse) *gatewayapi.ResolveSourceMetaResponse {
	out := &gatewayapi.ResolveSourceMetaResponse{Source: res.Op}
	if i := res.Image; i != nil {
		out.Image = &gatewayapi.ResolveSourceImageResponse{Digest: i.Digest.String(), Config: i.Config}
	}
	if g := res.Git; g != nil {
		out.Git = &gatewayapi.ResolveSourceGitResponse{
			Checksum: g.Checksum, Ref: g.Ref, CommitChecksum: g.CommitChecksum, CommitObject: g.CommitObject, TagObject: g.TagObject,
		}
	}
	if h := res.HTTP; h != nil {
		out.HTTP = &gatewayapi.ResolveSourceHTTPResponse{Checksum: h.Digest.String(), Filename: h.Filename}
		if h.LastModified != nil {
			out.HTTP.LastModified = &timestamppb.Timestamp{Seconds: h.LastModified.Unix()}
		}
		if c := h.ChecksumResponse; c != nil {
			out.HTTP.ChecksumResponse = &gatewayapi.ChecksumResponse{Digest: c.Digest, Suffix: c.Suffix}
		}
	}
	return out
}

// ResolveImageConfig implements gatewayapi.LLBBridgeServer.
func (g *gateway) ResolveImageConfig(ctx context.Context, req *gatewayapi.ResolveImageConfigRequest) (*gatewayapi.ResolveImageConfigResponse, error) {
	b, ctx, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	p := platformOf(req.Platform)
	opt := sourceresolver.Opt{LogName: req.LogName, SourcePolicies: req.SourcePolicies}
	switch sourceresolver.ResolverType(req.ResolverType) {
	case sourceresolver.ResolverTypeRegistry:
		opt.ImageOpt = &sourceresolver.ResolveImageOpt{ResolveMode: req.ResolveMode, Platform: p}
	case sourceresolver.ResolverTypeOCILayout:
		opt.OCILayoutOpt = &sourceresolver.ResolveOCILayoutOpt{
			Store: sourceresolver.ResolveImageConfigOptStore{SessionID: req.SessionID, StoreID: req.StoreID}, Platform: p,
		}
	}
	ref, dgst, config, err := sourceresolver.NewImageMetaResolver(resolver{b.run}).ResolveImageConfig(ctx, req.Ref, opt)
	if err != nil {
		return nil, ending(ctx, err)
	}
	return &gatewayapi.ResolveImageConfigResponse{Ref: ref, Digest: dgst.String(), Config: config}, nil
}

// resolver is a sourceresolver.MetaResolver.
type resolver struct{ run *running }

// ResolveSourceMetadata implements sourceresolver.MetaResolver.
func (r resolver) ResolveSourceMetadata(ctx context.Context, op *pb.SourceOp, opt sourceresolver.Opt) (*sourceresolver.MetaResponse, error) {
	policy, err := r.run.policy.With(opt.SourcePolicies)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if op, err = policy.Source(ctx, op, frontend.PlatformOf(opt)); err != nil {
		return nil, fmt.Errorf("could not resolve image due to policy: %w", err)
	}
	return frontend.ResolveSource(ctx, r.run.build, r.run.rec, op, opt)
}

func platformOf(p *pb.Platform) *ocispec.Platform {
	if p == nil {
		return nil
	}
	spec := p.Spec()
	return &spec
}

// Warn implements gatewayapi.LLBBridgeServer.
func (g *gateway) Warn(ctx context.Context, req *gatewayapi.WarnRequest) (*gatewayapi.WarnResponse, error) {
	b, _, end, err := g.bridge(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	if slices.Contains(req.Ranges, nil) {
		return nil, status.Error(codes.InvalidArgument, "invalid source range")
	}
	b.run.status.warn(&controlapi.VertexWarning{
		Vertex: req.Digest, Level: max(req.Level, 1), Short: req.Short, Detail: req.Detail, Url: req.Url, Info: req.Info, Ranges: req.Ranges,
	})
	return &gatewayapi.WarnResponse{}, nil
}

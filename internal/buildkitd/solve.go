package buildkitd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/verifier"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/result"
	"github.com/moby/buildkit/util/entitlements"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/buildkitd/peer"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
)

// Solve implements controlapi.ControlServer: it is one build, and ends with the client's request.
func (s *Server) Solve(ctx context.Context, req *controlapi.SolveRequest) (_ *controlapi.SolveResponse, err error) {
	if !identifier.MatchString(req.Ref) {
		return nil, status.Errorf(codes.InvalidArgument, "the build's ref %.100q is not valid", req.Ref)
	}
	j := &job{ref: req.Ref, owner: caller(ctx), status: newStatusLog()}
	if req.Definition == nil && req.Frontend == "" {
		j.bridge = newBridge(ctx, req.FrontendInputs)
	}
	done, err := s.jobs.add(j)
	if err != nil {
		return nil, err
	}
	defer func() { done(err) }()
	defer j.status.end()
	defer func() {
		if j.bridge != nil {
			j.bridge.close(err)
		}
	}()
	granted, err := s.check(ctx, req)
	if err != nil {
		return nil, err
	}
	var out outcome
	if !req.Internal {
		s.history.begin(j, req)
		defer func() { s.history.end(context.WithoutCancel(ctx), j.ref, out, err) }()
	}
	err = errors.New("the build ended in an unforeseen way")
	out, err = s.solve(ctx, j, req, granted)
	return &controlapi.SolveResponse{ExporterResponse: out.meta}, err
}

// outcome is what a build has come to.
type outcome struct {
	meta   map[string]string            // what clients are told
	images map[int64]ocispec.Descriptor // by the number of the exporter
}

// check refuses what is not valid or not supported, before anything is done, and puts what clients of
// old versions say into the words of new ones.
func (s *Server) check(ctx context.Context, req *controlapi.SolveRequest) (entitlements.Set, error) {
	invalid := func(format string, a ...any) (entitlements.Set, error) {
		return nil, status.Errorf(codes.InvalidArgument, format, a...)
	}
	unsupported := func(what string) (entitlements.Set, error) {
		return nil, status.Errorf(codes.Unimplemented, "%s not supported", what)
	}
	switch {
	case req.Session != "" && !identifier.MatchString(req.Session):
		return invalid("the session's id %.100q is not valid", req.Session)
	case req.Session != "" && !s.sessions.allowed(req.Session, caller(ctx)):
		return nil, status.Error(codes.PermissionDenied, "the session belongs to another client")
	case req.Definition != nil && req.Definition.Def != nil && req.Frontend != "":
		return invalid("cannot solve with both Definition and Frontend specified")
	case req.CompatibilityVersion != 0 && req.CompatibilityVersion != compatibility:
		return unsupported(fmt.Sprintf("compatibility-version %d is", req.CompatibilityVersion))
	case len(req.SourcePolicy.GetRules()) > 0 || req.SourcePolicySession != "":
		return unsupported("source policies are")
	case req.ProxyNetwork:
		return unsupported("the proxy network is")
	}
	if err := noAttestations(req.FrontendAttrs); err != nil {
		return nil, err
	}
	if len(req.Exporters) == 0 && req.ExporterDeprecated != "" {
		req.Exporters = []*controlapi.Exporter{{Type: req.ExporterDeprecated, Attrs: req.ExporterAttrsDeprecated}}
	}
	return s.grant(req.Entitlements)
}

// noAttestations refuses those that are asked for. The provenance that buildx adds to images if nobody has said
// that there is to be none is not: its absence is what is documented.
func noAttestations(attrs map[string]string) error {
	for k, v := range attrs {
		kind, ok := strings.CutPrefix(k, "attest:")
		if !ok {
			kind, ok = strings.CutPrefix(k, "build-arg:BUILDKIT_ATTEST_")
		}
		if !ok || slices.Contains(strings.Split(v, ","), "inline-only=true") {
			continue
		}
		return status.Errorf(codes.Unimplemented, "attestations (%.100q) are not supported", strings.ToLower(kind))
	}
	return nil
}

// compatibility is the version of BuildKit's compatibility rules that results follow.
const compatibility = 30

// grant gives the client what it asks for, of what the server may give.
func (s *Server) grant(asked []string) (entitlements.Set, error) {
	convert := func(names []string) []entitlements.Entitlement {
		es := make([]entitlements.Entitlement, 0, len(names)) // nil would mean all
		for _, n := range names {
			es = append(es, entitlements.Entitlement(n))
		}
		return es
	}
	set, err := entitlements.WhiteList(convert(asked), convert(s.opt.Entitlements))
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	return set, nil
}

// solve runs a build from its beginning to the end, and returns what is said about the result.
func (s *Server) solve(ctx context.Context, j *job, req *controlapi.SolveRequest, granted entitlements.Set) (done outcome, err error) {
	rec := progress.NewRecorder(progress.NewThin(j.status))
	scratch, cleanup, err := s.opt.Store.TempDir("client")
	if err != nil {
		return done, err
	}
	defer cleanup()
	get := func(ctx context.Context, id string) (session.Caller, error) { return s.sessions.get(ctx, id, j.owner) }
	p := peer.New(ctx, get, req.Session, scratch)
	defer p.Close()
	epochOfArgs(req)
	out, err := outputs(req.Exporters, p, 0)
	if err != nil {
		return done, err
	}
	chosen, err := configs(req.Exporters)
	if err != nil {
		return done, err
	}
	from, to, insecure, err := caches(req.Cache)
	if err != nil {
		return done, err
	}
	ro := s.opt.Registry
	ro.Keychain, ro.Insecure = p, slices.Concat(insecureHosts(out), insecure, ro.Insecure)
	reg, err := registry.New(ro)
	if err != nil {
		return done, err
	}
	env := build.Env{Store: s.opt.Store, Registry: reg, Progress: rec, Sandbox: s.opt.Sandbox, Parallel: s.opt.Parallel, Environ: s.opt.Environ, Limit: s.opt.Limit}
	defer env.Collect(ctx)
	b, err := build.Open(ctx, env, build.Inputs{
		Contexts: p, Layouts: p, Directories: p, Secrets: p, SSH: p, Uploads: p, Pull: true, CacheFrom: from,
	})
	if err != nil {
		return done, err
	}
	defer b.Close()
	if j.bridge != nil {
		defer func() { j.bridge.close(err) }()
	}
	run := &running{build: b, peer: p, session: req.Session, granted: granted, rec: rec, status: j.status}
	res, err := run.result(ctx, j, req)
	if err != nil {
		return done, ending(ctx, err)
	}
	if req.EnableSessionExporter {
		if out, err = run.addOutputs(ctx, j.bridge, res, out); err != nil {
			return done, ending(ctx, err)
		}
	}
	if err := run.checkPlatforms(ctx, req.FrontendAttrs, res); err != nil {
		return done, err
	}
	if len(chosen) > 0 {
		res.Metadata = maps.Clone(res.Metadata)
		if res.Metadata == nil {
			res.Metadata = map[string][]byte{}
		}
		maps.Copy(res.Metadata, chosen)
	}
	done, err = run.export(ctx, res, build.Export{Outputs: out, CacheTo: to})
	if err == nil && req.EnableSessionExporter {
		err = p.FinalizeExport(ctx, done.meta)
	}
	return done, ending(ctx, err)
}

// epochOfArgs gives the build argument SOURCE_DATE_EPOCH to exporters that have none of their own: it counts
// for definitions and clients' own front ends, too. A front end says what is wrong with one that is no time.
func epochOfArgs(req *controlapi.SolveRequest) {
	v := req.FrontendAttrs["build-arg:SOURCE_DATE_EPOCH"]
	if _, err := strconv.ParseInt(v, 10, 64); err != nil {
		return
	}
	for _, e := range req.Exporters {
		if _, ok := e.Attrs["source-date-epoch"]; !ok {
			e.Attrs = maps.Clone(e.Attrs)
			if e.Attrs == nil {
				e.Attrs = map[string]string{}
			}
			e.Attrs["source-date-epoch"] = v
		}
	}
}

// ending prefers the reason why a build was ended to what that led to.
func ending(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// running is a build with what its client has been granted.
type running struct {
	build   *build.Build
	peer    *peer.Peer
	session string
	granted entitlements.Set
	rec     *progress.Recorder
	status  *statusLog
}

// result is what the request's front end makes, or the client in its place.
func (r *running) result(ctx context.Context, j *job, req *controlapi.SolveRequest) (*frontend.Result, error) {
	if j.bridge != nil {
		return j.bridge.serve(ctx, r)
	}
	return r.solve(ctx, request{
		Definition: req.Definition, Frontend: req.Frontend, Attrs: req.FrontendAttrs, Inputs: req.FrontendInputs,
	})
}

// request asks for a definition, or for what a front end makes.
type request struct {
	Definition *frontend.Definition
	Frontend   string
	Attrs      map[string]string
	Inputs     map[string]*frontend.Definition
	Evaluate   bool // the results are computed at once
}

// solve makes a result; nothing needs to have been computed.
func (r *running) solve(ctx context.Context, req request) (res *frontend.Result, err error) {
	switch {
	case req.Definition.GetDef() != nil && req.Frontend != "":
		return nil, status.Error(codes.InvalidArgument, "cannot solve with both Definition and Frontend specified")
	case req.Definition.GetDef() != nil:
		res = &frontend.Result{Ref: req.Definition}
	case req.Frontend != "":
		if res, err = r.frontend(ctx, req); err != nil {
			fe := errdefs.Frontend{Name: req.Frontend, Source: req.Attrs["source"]}
			return nil, fe.WrapError(err)
		}
	default:
		return &frontend.Result{}, nil
	}
	if err := r.allowed(res); err != nil {
		return nil, err
	}
	if req.Evaluate {
		err = res.Each(func(def *frontend.Definition) error { return located(r.build.Evaluate(ctx, def), def) })
	}
	return res, err
}

// frontend runs the front end that is linked in, by one of the names that it goes by.
func (r *running) frontend(ctx context.Context, req request) (*frontend.Result, error) {
	attrs := req.Attrs
	switch req.Frontend {
	case "dockerfile.v0":
	case "gateway.v0":
		source := attrs["source"]
		if source == "" {
			return nil, errors.New("no source specified for gateway")
		}
		if source != "dockerfile.v0" {
			if err := frontend.Builtin(source); err != nil {
				return nil, err
			}
		}
		attrs = maps.Clone(attrs)
		delete(attrs, "source")
	default:
		return nil, status.Errorf(codes.InvalidArgument, "invalid frontend: %s", req.Frontend)
	}
	if err := noAttestations(attrs); err != nil {
		return nil, err
	}
	if err := r.useCaches(cachesOfArgs(attrs)); err != nil {
		return nil, err
	}
	return r.build.Frontend(ctx, frontend.Input{Attrs: attrs, Inputs: req.Inputs, SessionID: r.session, Contexts: r.peer})
}

// addOutputs adds those that the client chooses when it knows the result. One that has a bridge (others: nil)
// can read the result's files by then.
func (r *running) addOutputs(ctx context.Context, b *bridge, res *frontend.Result, out []build.Output) ([]build.Output, error) {
	var refs []string
	err := res.Each(func(def *frontend.Definition) error {
		switch n := len(def.GetDef()); {
		case n == 0:
		case b == nil:
			refs = append(refs, digest.FromBytes(def.Def[n-1]).String())
		default:
			ref, err := b.register(def)
			if err != nil {
				return err
			}
			refs = append(refs, ref.Id)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	found, err := r.peer.FindExporters(ctx, res.Metadata, refs)
	if err != nil {
		return nil, err
	}
	if chosen, err := configs(found); err != nil || len(chosen) > 0 {
		return nil, status.Error(codes.Unimplemented, "exporters that the session chooses cannot have configs")
	}
	more, err := outputs(found, r.peer, len(out))
	if err != nil {
		return nil, err
	}
	if len(insecureHosts(more)) > 0 {
		return nil, status.Error(codes.Unimplemented, "exporters that the session chooses cannot use registry.insecure")
	}
	return append(out, more...), nil
}

// checkPlatforms warns if the result's platforms are not those that were asked for.
func (r *running) checkPlatforms(ctx context.Context, attrs map[string]string, res *frontend.Result) error {
	v := &result.Result[*frontend.Definition]{Ref: res.Ref, Refs: res.Refs, Metadata: maps.Clone(res.Metadata)}
	if err := verifier.CaptureFrontendOpts(attrs, v); err != nil {
		return err
	}
	warnings, err := verifier.CheckInvalidPlatforms(ctx, v)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "the result's platforms: %v", err)
	}
	for _, w := range warnings {
		r.status.warn(&controlapi.VertexWarning{Vertex: digest.FromBytes(w.Short).String(), Level: 1, Short: w.Short})
	}
	return nil
}

func definitions(p *frontend.Plan) (defs []*frontend.Definition) {
	for _, pp := range p.Platforms {
		defs = append(defs, pp.Definition)
	}
	return defs
}

// export writes the result to where it was asked for.
func (r *running) export(ctx context.Context, res *frontend.Result, x build.Export) (done outcome, err error) {
	if err := name(x.Outputs, string(res.Metadata["image.name"])); err != nil {
		return done, err
	}
	if err := annotate(x.Outputs, res.Metadata); err != nil {
		return done, err
	}
	plan, err := res.Plan()
	if err != nil {
		return done, err
	}
	out, err := r.build.Export(ctx, plan, x)
	if err != nil {
		return done, located(err, definitions(plan)...)
	}
	meta, err := out.Metadata()
	if err != nil {
		return done, err
	}
	for _, o := range x.Outputs { // of several exporters, the last one says the name
		if len(o.Names) > 0 {
			meta["image.name"] = strings.Join(o.Names, ",")
		}
	}
	if m, err := r.peer.CacheManifest(); err != nil {
		return done, err
	} else if m != "" {
		meta["cache.manifest"] = m
	}
	for k, v := range res.Metadata {
		if strings.HasPrefix(k, "frontend.") {
			meta[k] = string(v)
		}
	}
	done = outcome{meta: meta, images: map[int64]ocispec.Descriptor{}}
	for i, d := range out.Images {
		if x.Outputs[i].Type == export.Image {
			done.images[int64(i)] = d
		}
	}
	return done, nil
}

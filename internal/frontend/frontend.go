// Package frontend turns a Dockerfile into a plan: for each platform a graph
// of operations (BuildKit's LLB) and the image's config.
//
// It is BuildKit's own Dockerfile front end, run in process against a gateway
// of ours that can read the local contexts and resolve images, so that what a Dockerfile
// means is what it means in Docker. Nothing is executed here. LLB and
// protobuf types leave this package only as the opaque Definition that engine/llb decodes.
package frontend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	commonexptypes "github.com/moby/buildkit/exporter/exptypes"
	"github.com/moby/buildkit/frontend/dockerfile/builder"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/frontend/subrequests/targets"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/system"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/image"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/source/remote"
	"github.com/kiln-build/kiln/internal/tree"
)

// Names of the two contexts that every build has.
const (
	ContextName    = "context"
	DockerfileName = "dockerfile"
)

// Input is everything that a Dockerfile's meaning depends on.
type Input struct {
	// Attrs are options by the names that BuildKit's front end has for them, all of those that
	// it knows; the fields below go before them.
	Attrs map[string]string
	// Inputs are definitions that the front end may ask for, by name: contexts, mostly.
	Inputs map[string]*Definition
	// SessionID is written into the graph as where local contexts come from; empty: "kiln",
	// so that the same input gives the same graph.
	SessionID string
	Filename  string // of the Dockerfile, in the tree named DockerfileName
	BuildArgs map[string]string
	Labels    map[string]string
	Target    string             // stage; empty: the last
	Platforms []ocispec.Platform // empty: this machine's
	// NoCache: steps are run though their results are known; NoCacheFilter: those
	// of these stages.
	NoCache       bool
	NoCacheFilter []string
	// Network is "", "default", "none" or "host": for RUN steps that do not say.
	Network string
	// Ulimits and ShmSize, in bytes, are for RUN steps.
	Ulimits []units.Ulimit
	ShmSize int64 // 0: the default
	// AddHosts are "HOST:IP" or "HOST=IP", for /etc/hosts in RUN steps.
	AddHosts []string
	// NamedContexts are --build-context NAME=VALUE, as BuildKit writes their
	// values: "docker-image://REF", "oci-layout://STORE@DIGEST", "local:NAME".
	NamedContexts map[string]string
	// Contexts opens the local contexts: ContextName, DockerfileName and
	// those that NamedContexts calls local.
	Contexts source.Contexts
	// ContextDate is when the commit was made that ContextName is of, if it is of one; else zero.
	ContextDate time.Time
	// Files reads what other definitions stand for; nil: nothing else can be read.
	Files Files
	// NoIgnoreFile: a .dockerignore in the context is a file like any other.
	NoIgnoreFile bool
}

// Sources resolves what a build starts from; nothing is fetched but what is asked for.
type Sources interface {
	Resolve(ctx context.Context, ref string, p ocispec.Platform) (*image.Image, error)
	// ResolveLayout resolves an image of the OCI layout that a named context calls store.
	ResolveLayout(ctx context.Context, store string, d digest.Digest, p ocispec.Platform) (*image.Image, error)
	// Describe resolves a file of an http server or a git repository, by the name and the attributes that it has in a graph.
	Describe(ctx context.Context, id string, attrs map[string]string, ask remote.Ask) (remote.Metadata, error)
}

// Definition is a graph of operations, to be decoded by engine/llb.
type Definition = pb.Definition

// Files computes definitions, of which the front end reads files while the plan is
// made: a Dockerfile in a git repository, say.
type Files interface {
	Tree(ctx context.Context, def *Definition) (tree.Tree, error)
}

// Plan is what a Dockerfile says is to be done.
type Plan struct {
	Platforms []PlatformPlan
	// Multi: the result is an index, though it be of one platform
	// (build argument BUILDKIT_MULTI_PLATFORM).
	Multi bool
}

// PlatformPlan is the plan for one platform.
type PlatformPlan struct {
	ID       string // "linux/amd64": what several are told apart by
	Platform ocispec.Platform
	// Definition is what is to be computed. Nil: an empty image.
	Definition *Definition
	// Config is the image's config, JSON, without the layers that are to come.
	Config []byte
	// BaseConfig is the config of the image that the last stage starts from; nil for scratch.
	BaseConfig []byte
	// Epoch is SOURCE_DATE_EPOCH, of the build arguments or the Dockerfile's own; nil: none.
	Epoch *time.Time
}

// Result is what a front end made, or a client in its place: definitions, of which nothing need
// have been computed, and what is said about them.
type Result struct {
	Ref *Definition // nil: an empty file system, or see Refs
	// Refs are in place of Ref, by the ID of a platform; nil: an empty file system.
	Refs map[string]*Definition
	// Metadata by BuildKit's keys (package exptypes): platforms, configs, answers to questions.
	Metadata map[string][]byte
}

// Each calls f with each definition, and with nil for an empty file system.
func (r *Result) Each(f func(*Definition) error) error {
	if r.Refs == nil {
		return f(r.Ref)
	}
	for _, id := range slices.Sorted(maps.Keys(r.Refs)) {
		if err := f(r.Refs[id]); err != nil {
			return err
		}
	}
	return nil
}

// Solve runs the front end. Errors that have to do with a line of the Dockerfile are *diag.Error.
func Solve(ctx context.Context, in Input, sources Sources, rec *progress.Recorder) (_ *Result, err error) {
	c := newClient(in, sources, rec)
	defer func() { c.step.Done(err) }()
	res, err := builder.Build(ctx, c)
	if err != nil {
		return nil, explain(err, in.Filename)
	}
	if err := c.checkFilter(ctx); err != nil {
		return nil, err
	}
	return newResult(res), nil
}

// Load is Solve for who wants a plan.
func Load(ctx context.Context, in Input, sources Sources, rec *progress.Recorder) (*Plan, error) {
	res, err := Solve(ctx, in, sources, rec)
	if err != nil {
		return nil, err
	}
	return res.Plan()
}

func newResult(res *gateway.Result) *Result {
	out := &Result{Metadata: res.Metadata}
	if res.Refs == nil {
		out.Ref = definition(res.Ref)
		return out
	}
	out.Refs = map[string]*Definition{}
	for id, r := range res.Refs {
		out.Refs[id] = definition(r)
	}
	return out
}

func definition(r gateway.Reference) *Definition {
	if r, ok := r.(*result); ok && r != nil {
		return r.def
	}
	return nil
}

// checkFilter warns of stages to be run anew that there are not: the front end
// does not look.
func (c *client) checkFilter(ctx context.Context) error {
	if len(c.in.NoCacheFilter) == 0 {
		return nil
	}
	res, err := builder.Build(ctx, c.with(map[string]string{"requestid": "frontend." + string(Targets)}))
	if err != nil {
		return explain(err, c.in.Filename)
	}
	var list targets.List
	if err := json.Unmarshal(res.Metadata["result.json"], &list); err != nil {
		return fmt.Errorf("read the front end's list of stages: %w", err)
	}
	for _, f := range c.in.NoCacheFilter {
		if !slices.ContainsFunc(list.Targets, func(t targets.Target) bool { return strings.EqualFold(t.Name, f) }) {
			c.step.Warn(progress.Finding{Text: fmt.Sprintf("--no-cache-filter: the Dockerfile has no stage %q", f)})
		}
	}
	return nil
}

// attributes are the options as BuildKit's front end names them.
func attributes(in Input) map[string]string {
	o := map[string]string{}
	maps.Copy(o, in.Attrs)
	if in.Filename != "" {
		o["filename"] = in.Filename
	}
	for k, v := range in.BuildArgs {
		o["build-arg:"+k] = v
	}
	for k, v := range in.Labels {
		o["label:"+k] = v
	}
	for k, v := range in.NamedContexts {
		o["context:"+k] = v
	}
	if in.Target != "" {
		o["target"] = in.Target
	}
	if len(in.NoCacheFilter) > 0 {
		o["no-cache"] = strings.Join(in.NoCacheFilter, ",")
	}
	if in.NoCache {
		o["no-cache"] = ""
	}
	if len(in.Platforms) > 0 {
		var ps []string
		for _, p := range in.Platforms {
			ps = append(ps, platforms.FormatAll(p))
		}
		o["platform"] = strings.Join(ps, ",")
	}
	if in.Network != "" && in.Network != "default" {
		o["force-network-mode"] = in.Network
	}
	if len(in.Ulimits) > 0 {
		var us []string
		for _, u := range in.Ulimits {
			us = append(us, u.String())
		}
		o["ulimit"] = strings.Join(us, ",")
	}
	if in.ShmSize > 0 {
		o["shm-size"] = strconv.FormatInt(in.ShmSize, 10)
	}
	if len(in.AddHosts) > 0 {
		var hs []string
		for _, h := range in.AddHosts {
			// The first separator is between name and address: an IPv6 address has more colons.
			if i := strings.IndexAny(h, "=:"); i >= 0 {
				h = h[:i] + "=" + strings.Trim(h[i+1:], "[]")
			}
			hs = append(hs, h)
		}
		o["add-hosts"] = strings.Join(hs, ",")
	}
	return o
}

// Plan is the result as a plan for each of its platforms.
func (r *Result) Plan() (*Plan, error) {
	ps, err := exptypes.ParsePlatforms(r.Metadata)
	if err != nil {
		return nil, fmt.Errorf("read the front end's platforms: %w", err)
	}
	if r.Refs == nil && len(ps.Platforms) > 1 {
		return nil, fmt.Errorf("one result for %d platforms", len(ps.Platforms))
	}
	plan := &Plan{Multi: r.Refs != nil}
	for _, p := range ps.Platforms {
		pp := PlatformPlan{
			ID: p.ID, Platform: p.Platform, Definition: r.Ref,
			Config:     exptypes.ParseKey(r.Metadata, exptypes.ExporterImageConfigKey, &p),
			BaseConfig: exptypes.ParseKey(r.Metadata, exptypes.ExporterImageBaseConfigKey, &p),
		}
		if r.Refs != nil {
			def, ok := r.Refs[p.ID]
			if !ok {
				return nil, fmt.Errorf("there is no result for platform %s", p.ID)
			}
			pp.Definition = def
		}
		if string(bytes.TrimSpace(pp.Config)) == "null" {
			return nil, errors.New("invalid null image config for export")
		}
		if pp.Config == nil {
			if pp.Config, err = defaultConfig(p.Platform); err != nil {
				return nil, err
			}
		}
		if s := exptypes.ParseKey(r.Metadata, commonexptypes.ExporterEpochKey, &p); len(s) > 0 {
			n, err := strconv.ParseInt(string(s), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("read the front end's SOURCE_DATE_EPOCH: %w", err)
			}
			t := time.Unix(n, 0).UTC()
			pp.Epoch = &t
		}
		plan.Platforms = append(plan.Platforms, pp)
	}
	return plan, nil
}

// defaultConfig is the config of an image that nobody said anything about.
func defaultConfig(p ocispec.Platform) ([]byte, error) {
	return json.Marshal(ocispec.Image{
		Platform: p,
		Config:   ocispec.ImageConfig{WorkingDir: "/", Env: []string{"PATH=" + system.DefaultPathEnv(p.OS)}},
		RootFS:   ocispec.RootFS{Type: "layers"},
	})
}

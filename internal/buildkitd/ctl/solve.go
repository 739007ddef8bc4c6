package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/buildid"
	gatewayapi "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session/grpchijack"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"golang.org/x/sync/errgroup"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
)

// Request is one build, in BuildKit's words: what is not known here the server may know.
type Request struct {
	Ref        string // a name that no other build has
	Definition *frontend.Definition
	Frontend   string
	Attrs      map[string]string
	Locals     map[string]string // directories by name
	Outputs    []Entry
	CacheTo    []Entry
	CacheFrom  []Entry
	Allow      []string // entitlements

	Keychain authn.Keychain
	Secrets  *secret.Secrets
	SSH      *sshagent.Agents

	SourcePolicy []byte // JSON; empty: none
	ProxyNetwork bool
	Stdout       io.Writer // for archives that have no other place
}

// Entry is an exporter or a cache.
type Entry struct {
	Type  string
	Attrs map[string]string
}

// Result is what the server says of a build.
type Result struct {
	Metadata map[string]string // by the exporters' names for it
	Answer   map[string][]byte // to a subrequest: result.txt, result.json …; nil: there was a build
}

// statusGrace is how long the server may go on telling of a build that has ended.
const statusGrace = 5 * time.Second

// Build has the server build, and reports to rec.
func (c *Client) Build(ctx context.Context, r Request, rec *progress.Recorder) (*Result, error) {
	req, err := r.solveRequest()
	if err != nil {
		return nil, err
	}
	outputs, err := r.outputs(req)
	if err != nil {
		return nil, err
	}
	defer outputs.discard()
	s, err := r.open(ctx)
	if err != nil {
		return nil, err
	}
	outputs.offer(s)
	req.Session = s.ID()
	res := &Result{}
	// Session and status outlive the request, to hear how it ended.
	outer, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Run(outer, grpchijack.Dialer(c.control)) })
	g.Go(func() error {
		if err := c.follow(outer, r.Ref, rec); err != nil && outer.Err() == nil {
			return fmt.Errorf("follow the build: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		defer func() {
			s.Close()
			time.AfterFunc(statusGrace, cancel)
		}()
		var err error
		res.Metadata, res.Answer, err = c.solve(gctx, req)
		return err
	})
	if err := g.Wait(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, explain(err)
	}
	return res, outputs.keep()
}

// solveRequest is the request for the server, without what a session has to do with.
func (r *Request) solveRequest() (*controlapi.SolveRequest, error) {
	req := &controlapi.SolveRequest{
		Ref: r.Ref, Definition: r.Definition, Frontend: r.Frontend, FrontendAttrs: maps.Clone(r.Attrs), Entitlements: r.Allow,
		ProxyNetwork: r.ProxyNetwork, Cache: &controlapi.CacheOptions{},
	}
	if len(r.SourcePolicy) > 0 {
		req.SourcePolicy = &spb.Policy{}
		if err := json.Unmarshal(r.SourcePolicy, req.SourcePolicy); err != nil {
			return nil, diag.New(diag.ExitUsage, "source policy: %w", err)
		}
	}
	for _, e := range slices.Concat(r.CacheTo, r.CacheFrom) {
		if e.Type == "local" {
			return nil, diag.New(diag.ExitUsage, "caches of type=local are not supported with a server").
				WithHint("Use type=registry, or build without a server.")
		}
	}
	for _, e := range r.CacheTo {
		req.Cache.Exports = append(req.Cache.Exports, &controlapi.CacheOptionsEntry{Type: e.Type, Attrs: e.Attrs})
	}
	for _, e := range r.CacheFrom {
		req.Cache.Imports = append(req.Cache.Imports, &controlapi.CacheOptionsEntry{Type: e.Type, Attrs: e.Attrs})
	}
	return req, nil
}

// requestID is the option of a front end that asks for something else than a build.
const requestID = "requestid"

func (c *Client) solve(ctx context.Context, req *controlapi.SolveRequest) (meta map[string]string, answer map[string][]byte, err error) {
	if req.FrontendAttrs[requestID] != "" {
		answer, err = c.ask(ctx, req)
		return nil, answer, err
	}
	res, err := c.control.Solve(ctx, req)
	return res.GetExporterResponse(), nil, err
}

// ask takes the part of the front end, which is the only one to get an answer: it has the real one
// make it, and gives it on as the result of the build.
func (c *Client) ask(ctx context.Context, req *controlapi.SolveRequest) (map[string][]byte, error) {
	attrs := req.FrontendAttrs
	if attrs["frontend.caps"] == "" {
		attrs["frontend.caps"] = "moby.buildkit.frontend.subrequests"
	}
	inner := &gatewayapi.SolveRequest{Frontend: req.Frontend, FrontendOpt: attrs, AllowResultReturn: true, AllowResultArrayRef: true}
	req.Frontend = ""
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := c.control.Solve(gctx, req)
		return err
	})
	answer := map[string][]byte{}
	bridge := gatewayapi.NewLLBBridgeClient(c.conn)
	gctx = buildid.AppendToOutgoingContext(gctx, req.Ref)
	g.Go(func() error {
		res, err := bridge.Solve(gctx, inner)
		if err != nil {
			return errors.Join(err, giveBack(gctx, bridge, nil, err))
		}
		maps.Copy(answer, res.GetResult().GetMetadata())
		return giveBack(gctx, bridge, res.GetResult(), nil)
	})
	return answer, g.Wait()
}

// giveBack ends the part of the front end.
func giveBack(ctx context.Context, bridge gatewayapi.LLBBridgeClient, res *gatewayapi.Result, failed error) error {
	ret := &gatewayapi.ReturnRequest{Result: res}
	if failed != nil {
		ret.Error = statusOf(failed)
	}
	_, err := bridge.Return(ctx, ret)
	return err
}

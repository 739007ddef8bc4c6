package ctl

import (
	"context"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/kiln-build/kiln/internal/progress"
)

// HistoryEvent is news of a build that the server remembers; Record is nil if there is none.
type HistoryEvent = controlapi.BuildHistoryEvent

// Histories calls f for each build that the server remembers.
func (c *Client) Histories(ctx context.Context, f func(*HistoryEvent) error) error {
	stream, err := c.control.ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{EarlyExit: true})
	return each(stream, err, f)
}

// Monitor calls f for what happens with builds, until ctx ends. ref, unless empty, is the one that it is about.
func (c *Client) Monitor(ctx context.Context, ref string, completed bool, f func(*HistoryEvent) error) error {
	stream, err := c.control.ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{ActiveOnly: !completed, Ref: ref})
	return each(stream, err, f)
}

// Pin keeps the server from forgetting a build, or lets it do so.
func (c *Client) Pin(ctx context.Context, ref string, pinned bool) error {
	_, err := c.control.UpdateBuildHistory(ctx, &controlapi.UpdateBuildHistoryRequest{Ref: ref, Pinned: pinned})
	return c.done(err)
}

// Forget has the server forget a build.
func (c *Client) Forget(ctx context.Context, ref string) error {
	_, err := c.control.UpdateBuildHistory(ctx, &controlapi.UpdateBuildHistoryRequest{Ref: ref, Delete: true})
	return c.done(err)
}

func (c *Client) done(err error) error {
	if err != nil {
		return explain(err)
	}
	return nil
}

// Logs shows what happened in a build that the server remembers.
func (c *Client) Logs(ctx context.Context, ref string, rec *progress.Recorder) error {
	return c.done(c.follow(ctx, ref, rec))
}

package buildkitd

import (
	"encoding/csv"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// filterHistory keeps the events that fit any of the expressions, and of those the newest, if there is
// a limit. An expression is a list of conditions, all of which hold: containerd's (status==error), or a
// comparison of startedAt, completedAt or duration.
func filterHistory(events []*controlapi.BuildHistoryEvent, expressions []string, limit int) ([]*controlapi.BuildHistoryEvent, error) {
	if limit < 0 {
		return nil, status.Errorf(codes.InvalidArgument, "invalid limit %d", limit)
	}
	if len(expressions) > 0 {
		var fits []func(*controlapi.BuildHistoryRecord) bool
		for _, e := range expressions {
			f, err := parseFilter(e)
			if err != nil {
				return nil, status.Errorf(codes.InvalidArgument, "filter %.200q: %v", e, err)
			}
			fits = append(fits, f)
		}
		events = slices.DeleteFunc(events, func(e *controlapi.BuildHistoryEvent) bool {
			return !slices.ContainsFunc(fits, func(f func(*controlapi.BuildHistoryRecord) bool) bool { return f(e.Record) })
		})
	}
	if limit > 0 {
		slices.SortStableFunc(events, func(a, b *controlapi.BuildHistoryEvent) int {
			return b.Record.CreatedAt.AsTime().Compare(a.Record.CreatedAt.AsTime())
		})
		events = events[:min(limit, len(events))]
	}
	return events, nil
}

func parseFilter(expression string) (func(*controlapi.BuildHistoryRecord) bool, error) {
	fields, err := csv.NewReader(strings.NewReader(expression)).Read()
	if err != nil {
		return nil, err
	}
	var conditions []func(*controlapi.BuildHistoryRecord) bool
	var rest []string
	for _, f := range fields {
		c, err := parseComparison(f)
		switch {
		case err != nil:
			return nil, err
		case c == nil:
			rest = append(rest, f)
		default:
			conditions = append(conditions, c)
		}
	}
	static, err := filters.ParseAll(strings.Join(rest, ","))
	if err != nil {
		return nil, err
	}
	return func(r *controlapi.BuildHistoryRecord) bool {
		for _, c := range conditions {
			if !c(r) {
				return false
			}
		}
		return static.Match(filters.AdapterFunc(func(path []string) (string, bool) { return field(r, path) }))
	}, nil
}

// parseComparison returns nil if f is none. A time may also be given as how long ago it was.
func parseComparison(f string) (func(*controlapi.BuildHistoryRecord) bool, error) {
	i := strings.IndexAny(f, "<>")
	if i < 0 {
		return nil, nil
	}
	key, op, value := f[:i], f[i:i+1], f[i+1:]
	if v, ok := strings.CutPrefix(value, "="); ok {
		op, value = op+"=", v
	}
	var than int64
	switch key {
	case "startedAt", "completedAt":
		d, err := time.ParseDuration(value)
		at := time.Now().Add(-d)
		if err != nil {
			if at, err = time.Parse(time.RFC3339, value); err != nil {
				return nil, err
			}
		}
		than = at.Unix()
	case "duration":
		d, err := time.ParseDuration(value)
		if err != nil {
			return nil, err
		}
		than = int64(d)
	default:
		return nil, nil
	}
	return func(r *controlapi.BuildHistoryRecord) bool {
		v := int64(lasted(r))
		switch key {
		case "startedAt":
			v = r.CreatedAt.AsTime().Unix()
		case "completedAt":
			v = r.CompletedAt.AsTime().Unix()
		}
		switch op {
		case "<":
			return v < than
		case "<=":
			return v <= than
		case ">":
			return v > than
		}
		return v >= than
	}, nil
}

// field is what conditions know a record's field as.
func field(r *controlapi.BuildHistoryRecord, path []string) (string, bool) {
	switch strings.Join(path, ".") {
	case "ref":
		return r.Ref, true
	case "status":
		switch {
		case r.CompletedAt == nil:
			return "running", true
		case r.Error == nil:
			return "completed", true
		case strings.Contains(r.Error.Message, "context canceled"):
			return "canceled", true
		}
		return "error", true
	case "repository":
		for _, attr := range []string{"vcs:source", "context"} {
			if v := r.FrontendAttrs[attr]; v != "" {
				return v, true
			}
		}
	}
	return "", false
}

package progress

import (
	"maps"
	"slices"
	"time"
)

// thinEvery is the least time between two transfer events of one item.
const thinEvery = 200 * time.Millisecond

// Thin is a Sink in front of another that lets through few of the events about
// transfers, of which there is one for each 64 KiB: for each item the first,
// the last, and one every 200 ms between. All else passes as it is.
type Thin struct {
	next  Sink
	steps map[int]map[string]*thinning
}

// thinning is what is known of one item.
type thinning struct {
	sent time.Time
	held *Event // the latest that was not let through
}

// NewThin returns a Sink in front of next.
func NewThin(next Sink) *Thin { return &Thin{next: next, steps: map[int]map[string]*thinning{}} }

// Send lets e through, or holds it back until the step ends.
func (t *Thin) Send(e Event) {
	switch e.Kind {
	case StepTransfer:
		if !t.passes(e) {
			return
		}
	case StepDone:
		items := t.steps[e.Step]
		for _, name := range slices.Sorted(maps.Keys(items)) {
			if held := items[name].held; held != nil {
				t.next.Send(*held)
			}
		}
		delete(t.steps, e.Step)
	}
	t.next.Send(e)
}

func (t *Thin) passes(e Event) bool {
	items := t.steps[e.Step]
	if items == nil {
		items = map[string]*thinning{}
		t.steps[e.Step] = items
	}
	i := items[e.Item]
	if i == nil {
		i = &thinning{}
		items[e.Item] = i
	}
	whole := e.Total > 0 && e.Current >= e.Total
	if !whole && e.Time.Sub(i.sent) < thinEvery {
		i.held = &e
		return false
	}
	i.sent, i.held = e.Time, nil
	return true
}

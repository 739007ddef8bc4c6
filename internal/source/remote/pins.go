package remote

import (
	"context"
	"sync"
)

// Pins keep what was found of sources. The zero value is ready. Safe for concurrent use.
type Pins struct {
	mu  sync.Mutex
	all map[string]*pin
}

// pin is what was found of one source.
type pin struct {
	turn  chan struct{} // holds a token while somebody looks
	found any           // nil: nothing yet
}

func (p *Pins) get(key string) *pin {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == nil {
		p.all = map[string]*pin{}
	}
	if p.all[key] == nil {
		p.all[key] = &pin{turn: make(chan struct{}, 1)}
	}
	return p.all[key]
}

// pinned is what find finds the first time that it finds anything. Of several callers one looks, and the others wait.
func pinned[T any](ctx context.Context, p *Pins, key string, find func() (T, error)) (found T, err error) {
	if p == nil {
		return find()
	}
	x := p.get(key)
	select {
	case x.turn <- struct{}{}:
	case <-ctx.Done():
		return found, context.Cause(ctx)
	}
	defer func() { <-x.turn }()
	if v, ok := x.found.(T); ok {
		return v, nil
	}
	if found, err = find(); err == nil {
		x.found = found
	}
	return found, err
}

package engine

import (
	"context"
	"encoding/json"
	"sync/atomic"

	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/tree"
)

// opened is a build context that is there for all of a build.
type opened struct {
	tree tree.Tree
	step atomic.Pointer[progress.Step] // the last one that used it, which is told of bytes that come
}

func isLocal(op *Op) bool {
	_, ok := op.Do.(*Local)
	return ok
}

// local is a build context without what its ignore file excludes. It is the
// same tree each time: it remembers which directories are left out. Its step goes on until
// all that is taken of it is known by its content, for which a client sends it.
func (r *run) local(ctx context.Context, s *state) (tree.Tree, error) {
	s.opened.Store(true)
	s.step.Start()
	l := s.op.Do.(*Local)
	key := l.key()
	r.mu.Lock()
	defer r.mu.Unlock()
	if o := r.contexts[key]; o != nil {
		o.step.Store(s.step)
		return o.tree, nil
	}
	o := &opened{}
	o.step.Store(s.step)
	sel := l.Selection
	sel.Progress = func(bytes int64) { o.step.Load().Transfer("transferring "+sel.Name+":", bytes, 0) }
	var err error
	if o.tree, err = r.Contexts.OpenContext(ctx, sel); err != nil {
		return nil, err
	}
	r.contexts[key] = o
	return o.tree, nil
}

// reads says that the step of s is about to read its contexts: what comes of them now comes for it. Files whose
// content was known without being sent come only then.
func (r *run) reads(s *state) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, in := range s.op.Inputs {
		if in.Op == nil || !isLocal(in.Op) {
			continue
		}
		if o := r.contexts[in.Op.Do.(*Local).key()]; o != nil {
			o.step.Store(s.step)
		}
	}
}

// used says that the key of s is known.
func (r *run) used(s *state) {
	for _, l := range r.locals {
		if l.consumers[s.op] && l.users.Add(-1) == 0 {
			l.finish()
		}
	}
}

// finish ends the step of a build context, if it has begun.
func (s *state) finish() {
	if s.opened.Load() {
		s.step.Done(nil)
	}
}

// key tells selections apart.
func (l *Local) key() string {
	b, err := json.Marshal(l.Selection)
	if err != nil {
		panic(err) // strings and lists of strings
	}
	return string(b)
}

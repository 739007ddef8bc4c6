package progress

import (
	"bytes"
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestRawJSON holds what is said in BuildKit's words. That these are its words
// is tested where its types may be imported, in package frontend.
func TestRawJSON(t *testing.T) {
	c := newClock()
	var b bytes.Buffer
	r := c.recorder(NewRawJSON(&b))
	r.Note("sandbox gvisor")
	warned(r)
	from := r.Plan(StepInfo{Name: "[1/3] FROM busybox", Digest: digest.FromString("from")})
	run := r.Plan(StepInfo{Name: "[2/3] RUN make", Digest: digest.FromString("run"), Inputs: []digest.Digest{digest.FromString("from")}})
	copied := r.Plan(StepInfo{Name: "[3/3] COPY --link a /", Digest: digest.FromString("copy"), Group: &Group{ID: "g", Name: "COPY", Weak: true}})
	from.Start()
	from.Transfer("sha256:0123456789ab", 10, 100)
	c.ms(1000)
	from.Transfer("sha256:0123456789ab", 100, 100)
	from.Transfer("of unknown size", 7, 0)
	c.ms(10)
	from.Done(nil)
	run.Start()
	say(run, "hi\xff\n")
	run.Done(errors.New("exit code: 2"))
	copied.Cached()
	r.Warn("about the whole")
	golden(t, "raw.jsonl", b.String())
}

// Two steps of one name are two, and the same two in the next build.
func TestDigestsOfNames(t *testing.T) {
	digests := func() (all []digest.Digest) {
		r := NewRecorder(sinkFunc(func(e Event) { all = append(all, e.Digest) }))
		for _, name := range []string{"a", "b", "a", "a"} {
			r.Step(name, "")
		}
		return all
	}
	first, second := digests(), digests()
	seen := map[digest.Digest]bool{}
	for i, d := range first {
		if d.Validate() != nil || seen[d] || d != second[i] {
			t.Errorf("step %d has digest %s, and %s in another build", i, d, second[i])
		}
		seen[d] = true
	}
}

type sinkFunc func(Event)

func (f sinkFunc) Send(e Event) { f(e) }

package progress

import (
	"encoding/json"
	"io"
)

// JSON writes each Event as one JSON object a line: docs/progress-json.md.
type JSON struct{ enc *json.Encoder }

// NewJSON returns a Display that writes JSON lines to w as events come.
func NewJSON(w io.Writer) *JSON {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return &JSON{enc: enc}
}

// Send writes e. There is nobody to tell that w failed.
func (j *JSON) Send(e Event) { _ = j.enc.Encode(e) }

// Close does nothing.
func (*JSON) Close() error { return nil }

// Quiet drops everything.
type Quiet struct{}

// NewQuiet returns a Display that shows nothing.
func NewQuiet() Quiet { return Quiet{} }

// Send drops e.
func (Quiet) Send(Event) {}

// Close does nothing.
func (Quiet) Close() error { return nil }

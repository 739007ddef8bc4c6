package progress

import (
	"encoding/json"
	"io"
)

// JSON writes each Event as one JSON object a line: docs/progress-json.md.
type JSON struct{ enc *json.Encoder }

// NewJSON returns a Display that writes JSON lines to w as events come, few of
// them about transfers.
func NewJSON(w io.Writer) Display {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return unbuffered{NewThin(&JSON{enc: enc})}
}

// Send writes e. There is nobody to tell that w failed.
func (j *JSON) Send(e Event) { _ = j.enc.Encode(e) }

// RawJSON writes each Event as BuildKit's clients have it: one Status a line.
type RawJSON struct {
	enc   *json.Encoder
	trans *Translator
}

// NewRawJSON is NewJSON in BuildKit's words.
func NewRawJSON(w io.Writer) Display {
	return unbuffered{NewThin(&RawJSON{enc: json.NewEncoder(w), trans: NewTranslator()})}
}

// Send writes e.
func (j *RawJSON) Send(e Event) { _ = j.enc.Encode(j.trans.Translate(e)) }

// unbuffered is a Sink that holds nothing back.
type unbuffered struct{ Sink }

// Close does nothing.
func (unbuffered) Close() error { return nil }

// NewQuiet returns a Display that shows nothing.
func NewQuiet() Display { return unbuffered{quiet{}} }

type quiet struct{}

func (quiet) Send(Event) {}

// Tee returns a Sink that hands each Event to all of sinks, in their order.
func Tee(sinks ...Sink) Sink { return tee(sinks) }

type tee []Sink

func (t tee) Send(e Event) {
	for _, s := range t {
		s.Send(e)
	}
}

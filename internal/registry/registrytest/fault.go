package registrytest

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// Fault is something that goes wrong with some requests. Exactly one of Status,
// Stall, Reset, Truncate and Serve says what.
type Fault struct {
	// Method and Path choose requests: by method, and by a part of the URL's
	// path. Empty: any.
	Method, Path string
	// Skip lets the first so many of them through.
	Skip int
	// Times is how many fail. Zero: all.
	Times int

	// Status is answered instead of what the registry would.
	Status     int
	RetryAfter string // header with Status
	Body       string // with Status
	// Stall answers nothing until the client gives up.
	Stall bool
	// Reset breaks the connection, after After bytes of the request's body were
	// read, without an answer.
	Reset bool
	// Truncate breaks the connection after After bytes of the answer's body.
	Truncate bool
	After    int64
	// Serve answers in whatever way; next is the registry.
	Serve func(w http.ResponseWriter, r *http.Request, next http.Handler)

	matched, done int
}

// Fail injects a fault. Of several that match a request the first counts.
func (r *Registry) Fail(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, &f)
}

// Heal removes all faults.
func (r *Registry) Heal() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = nil
}

func (r *Registry) fault(req *http.Request) *Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.faults {
		if f.Method != "" && f.Method != req.Method || !strings.Contains(req.URL.Path, f.Path) {
			continue
		}
		f.matched++
		if f.matched <= f.Skip || f.Times > 0 && f.done >= f.Times {
			continue
		}
		f.done++
		r.counts.Failed++
		return f
	}
	return nil
}

func (f *Fault) serve(w http.ResponseWriter, req *http.Request, next http.Handler) {
	switch {
	case f.Serve != nil:
		f.Serve(w, req, next)
	case f.Stall:
		_, _ = io.Copy(io.Discard, req.Body) // or the server does not see the client go
		<-req.Context().Done()
	case f.Reset:
		_, _ = io.CopyN(io.Discard, req.Body, f.After)
		Reset(w)
	case f.Truncate:
		next.ServeHTTP(&truncated{ResponseWriter: w, left: f.After}, req)
	default:
		if f.RetryAfter != "" {
			w.Header().Set("Retry-After", f.RetryAfter)
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(f.Body)))
		w.WriteHeader(f.Status)
		_, _ = io.WriteString(w, f.Body)
	}
}

// Reset breaks the connection of a request with a TCP reset.
func Reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// truncated breaks the connection after so many bytes.
type truncated struct {
	http.ResponseWriter
	left int64
}

func (t *truncated) Write(p []byte) (int, error) {
	if int64(len(p)) < t.left {
		t.left -= int64(len(p))
		return t.ResponseWriter.Write(p)
	}
	_, _ = t.ResponseWriter.Write(p[:t.left])
	_ = http.NewResponseController(t.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

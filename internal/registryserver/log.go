package registryserver

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// quiet takes distribution's logs off the standard error. It writes them to
// logrus's standard logger and to nothing else, so that is what must be set;
// nothing else in Kiln logs there. Its account of requests is dropped, its
// internal errors go to logger.
func quiet(logger *slog.Logger) {
	std := logrus.StandardLogger()
	std.SetOutput(io.Discard)
	std.SetLevel(logrus.ErrorLevel)
	hooks := logrus.LevelHooks{}
	hooks.Add(forward{logger})
	std.ReplaceHooks(hooks)
}

type forward struct{ to *slog.Logger }

func (forward) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel}
}

// Fire implements logrus.Hook. An error that was the client's, such as a blob
// that is not there, is not worth a line.
func (f forward) Fire(e *logrus.Entry) error {
	code, isAnswer := e.Data["err.code"]
	if isAnswer && fmt.Sprint(code) != "unknown" {
		return nil
	}
	f.to.Error("registry: "+e.Message, "error", e.Data["err.message"], "detail", e.Data["err.detail"])
	return nil
}

// accessLog writes a line for each request.
type accessLog struct {
	next http.Handler
	mu   sync.Mutex
	w    io.Writer
}

func (a *accessLog) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rec := &recorder{ResponseWriter: w, status: http.StatusOK}
	a.next.ServeHTTP(rec, r)
	line := fmt.Sprintf("%s %s %s %q %d %dB %s\n", start.UTC().Format(time.RFC3339), r.RemoteAddr,
		r.Method, r.URL.Path, rec.status, rec.bytes, time.Since(start).Round(time.Microsecond))
	a.mu.Lock()
	defer a.mu.Unlock()
	_, _ = io.WriteString(a.w, line) // a log that cannot be written stops no one
}

type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (r *recorder) WriteHeader(code int) {
	r.status = code
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(p []byte) (int, error) {
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

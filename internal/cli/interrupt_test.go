package cli

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
)

// A command that is interrupted ends at once, with its own exit code.
func TestInterrupted(t *testing.T) {
	asked := make(chan struct{}, 100)
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done() // a registry that never answers
	}))
	defer s.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-asked
		cancel()
	}()
	var out, errs strings.Builder
	begun := time.Now()
	code := Main(ctx, []string{"kiln", "pull", "--root", t.TempDir(), strings.TrimPrefix(s.URL, "http://") + "/app"},
		console.Streams{In: strings.NewReader(""), Out: &out, Err: &errs})
	if code != diag.ExitInterrupted {
		t.Errorf("exit code %d", code)
	}
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	if !strings.HasSuffix(errs.String(), "ERROR: interrupted\n") || out.Len() > 0 {
		t.Errorf("printed %q and %q", out.String(), errs.String())
	}
}

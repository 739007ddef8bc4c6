package buildctl

import (
	"context"
	"encoding/base64"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/cli/console"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
)

// requestID is the option that asks the front end for something else than a build.
const requestID = "requestid"

// ask asks the front end, and prints what it says.
func (b *builder) ask(ctx context.Context, env build.Env, req build.Request, id string) error {
	q, ok := strings.CutPrefix(id, "frontend.")
	if !ok || !slices.Contains(frontend.Questions(), frontend.Question(q)) {
		return diag.New(diag.ExitUsage, "--opt requestid=%s is not known", id).
			WithHint("There are frontend.lint, frontend.outline, frontend.targets and frontend.subrequests.describe.")
	}
	delete(req.Attrs, requestID)
	delete(req.Attrs, "frontend.caps")
	var answer *frontend.Answer
	if err := b.show(func(rec *progress.Recorder) (err error) {
		env.Progress = rec
		answer, err = build.Ask(ctx, env, req, frontend.Question(q))
		return err
	}); err != nil {
		return err
	}
	return answer.PrintText(b.Out)
}

// printAnswer prints a server's answer to a question, as buildctl does: the text of it, or all there is.
func printAnswer(w io.Writer, answer map[string][]byte) error {
	if text, ok := answer["result.txt"]; ok {
		return (&frontend.Answer{Text: text}).PrintText(w)
	}
	for _, k := range slices.Sorted(maps.Keys(answer)) {
		if !strings.HasPrefix(k, "result.") {
			continue
		}
		if err := (&frontend.Answer{Text: fmt.Appendf(nil, "%s\n%s\n", k, answer[k])}).PrintText(w); err != nil {
			return err
		}
	}
	return nil
}

// writeMetadata writes what exporters say of a result, as buildctl does: JSON that is wrapped in base64
// is unwrapped. If there is nothing to be said, there is no file.
func writeMetadata(file string, said map[string]string) error {
	if len(said) == 0 {
		return nil
	}
	m := map[string]any{}
	for k, v := range said {
		m[k] = v
		var object map[string]any
		if b, err := base64.StdEncoding.DecodeString(v); err == nil && json.Unmarshal(b, &object) == nil && len(object) > 0 {
			m[k] = json.RawMessage(b)
		}
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = console.WriteText(file, string(b))
	}
	if err != nil {
		return fmt.Errorf("write --metadata-file: %w", err)
	}
	return nil
}

// authCerts are the certificates that --registry-auth-tlscontext gives for registries.
func authCerts(values []string) (map[string]registry.Certs, error) {
	all := map[string]registry.Certs{}
	for _, v := range values {
		fail := func(why string) (map[string]registry.Certs, error) {
			return nil, diag.New(diag.ExitUsage, "invalid --registry-auth-tlscontext %q: %s", v, why)
		}
		fields, err := csv.NewReader(strings.NewReader(v)).Read()
		if err != nil {
			return fail(err.Error())
		}
		kv, err := pairs("registry-auth-tlscontext", fields)
		if err != nil {
			return nil, err
		}
		_, host, ok := strings.Cut(kv["host"], "://")
		if !ok {
			host = kv["host"]
		}
		insecure, _ := strconv.ParseBool(kv["insecure"])
		switch {
		case host == "":
			return fail("it needs host=HOST")
		case insecure:
			return fail("insecure=true is not supported: a password would go to whoever answers; name the CA with ca=FILE")
		case (kv["cert"] == "") != (kv["key"] == ""):
			return fail("cert=FILE and key=FILE belong together")
		case kv["ca"]+kv["cert"] == "":
			return fail("it needs ca=FILE, or cert=FILE and key=FILE")
		}
		c := all[strings.ToLower(host)]
		if kv["ca"] != "" {
			c.CAs = append(c.CAs, kv["ca"])
		}
		if kv["cert"] != "" {
			c.Pairs = append(c.Pairs, registry.KeyPair{Cert: kv["cert"], Key: kv["key"]})
		}
		all[strings.ToLower(host)] = c
	}
	return all, nil
}

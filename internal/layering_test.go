// Package layering holds one test: the rules of who may import whom. They are
// checked here, with their reasons, so that nobody has to remember them.
package layering

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kiln-build/kiln/"

// levels says how far up a package is: it imports only what is at its own level
// or below. A package inherits its place from the directory above it.
var levels = map[string]int{
	"internal/diag":           0,
	"internal/tree":           0,
	"internal/progress":       0,
	"internal/secret":         0,
	"internal/sshagent":       0,
	"internal/decompress":     1,
	"internal/layer":          1,
	"internal/rootfs":         2,
	"internal/fileop":         2,
	"internal/store":          2,
	"internal/source":         2,
	"internal/image":          3,
	"internal/sandbox":        3,
	"internal/cache":          3,
	"internal/cachemount":     4,
	"internal/gc":             5,
	"internal/registry":       4,
	"internal/registryserver": 4,
	"internal/engine":         4,
	"internal/frontend":       4,
	"internal/export":         5,
	"internal/cache/remote":   5,
	"internal/build":          6,
	"internal/buildkitd":      7,
	"internal/cli":            8,
	"cmd":                     9,
}

// forbidden are imports that the levels alone would allow.
var forbidden = []struct{ from, to, why string }{
	{"internal/engine", "internal/registry", "the engine knows results and keys; where images come from is its caller's business"},
	{"internal/engine", "internal/frontend", "the engine runs any graph, not just a Dockerfile's"},
	{"internal/frontend", "internal/engine", "the front end makes a plan and does not run it"},
	{"internal/registry", "internal/engine", "a registry client knows nothing of builds"},
	{"internal/sandbox", "internal/image", "a sandbox gets layers and gives a tar back; configs and manifests are not its business"},
	{"internal/image", "internal/sandbox", "an image does not know how it was made"},
}

// outside says who alone may import a module from elsewhere.
var outside = []struct {
	prefix string
	by     []string
	why    string
}{
	{"github.com/moby/buildkit", []string{"internal/frontend", "internal/engine/llb", "internal/buildkitd"}, "LLB and protobuf types stop at the front end and the engine's decoder"},
	{"gvisor.dev/gvisor", []string{"internal/sandbox/gvisor"}, "one package knows the sentry"},
	{"github.com/aws/aws-sdk-go-v2", []string{"internal/registry/auth/ecr"}, "one package knows AWS; of the SDK it uses only what is light"},
}

// unlinked must not be in the builder at all.
var unlinked = []struct{ prefix, why string }{
	{"k8s.io", "Kubernetes is the build service's, not the builder's"},
	{"sigs.k8s.io", "Kubernetes is the build service's, not the builder's"},
	{"github.com/aws/aws-sdk-go", "cloud SDKs are megabytes for a few HTTP requests"},
	{"github.com/aws/aws-sdk-go-v2/service/ecr", "cloud SDKs are megabytes for a few HTTP requests"},
	{"github.com/aws/aws-sdk-go-v2/service/s3", "cloud SDKs are megabytes for a few HTTP requests"},
	{"github.com/Azure/azure-sdk-for-go", "cloud SDKs are megabytes for a few HTTP requests"},
	{"cloud.google.com/go", "cloud SDKs are megabytes for a few HTTP requests"},
	{"github.com/docker/docker", "there is no daemon to talk to"},
	{"github.com/containerd/containerd/v2/client", "there is no daemon to talk to"},
}

type pkg struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Imports,TestImports,XTestImports"}, args...)...)
	cmd.Dir = ".."
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func under(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// level is that of the nearest directory at or above a package that has one.
func level(p string) (int, bool) {
	for d := p; d != "."; d = filepath.Dir(d) {
		if l, ok := levels[d]; ok {
			return l, true
		}
	}
	return 0, false
}

// check returns what is wrong with an import of the package from, in words.
func check(from, imported string) []string {
	var wrong []string
	for _, o := range outside {
		if under(imported, o.prefix) && !slices.ContainsFunc(o.by, func(d string) bool { return under(from, d) }) {
			wrong = append(wrong, fmt.Sprintf("%s imports %s, which only %s may: %s", from, imported, strings.Join(o.by, ", "), o.why))
		}
	}
	to, ours := strings.CutPrefix(imported, module)
	if !ours {
		return wrong
	}
	for _, f := range forbidden {
		if under(from, f.from) && under(to, f.to) {
			wrong = append(wrong, fmt.Sprintf("%s imports %s: %s", from, to, f.why))
		}
	}
	if under(to, "test") {
		return append(wrong, fmt.Sprintf("%s imports %s: the product does not know its tests", from, to))
	}
	lf, okf := level(from)
	lt, okt := level(to)
	switch {
	case !okf:
		wrong = append(wrong, fmt.Sprintf("%s has no place in the layering: give it one in internal/layering_test.go", from))
	case okt && lt > lf:
		wrong = append(wrong, fmt.Sprintf("%s imports %s: imports point downwards, and it is above", from, to))
	}
	return wrong
}

func TestImportsPointDownwards(t *testing.T) {
	for _, p := range list(t, "./internal/...") {
		from := strings.TrimPrefix(p.ImportPath, module)
		if from == "internal" {
			continue
		}
		for _, i := range p.Imports {
			for _, w := range check(from, i) {
				t.Error(w)
			}
		}
		if _, ok := level(from); !ok {
			t.Errorf("%s has no place in the layering: give it one in internal/layering_test.go", from)
		}
	}
}

func TestNobodyImportsCLI(t *testing.T) {
	for _, p := range list(t, "./...") {
		from := strings.TrimPrefix(p.ImportPath, module)
		if under(from, "internal/cli") || under(from, "cmd") {
			continue
		}
		for _, i := range p.Imports {
			if under(strings.TrimPrefix(i, module), "internal/cli") {
				t.Errorf("%s imports %s: the command line is the outermost layer", from, i)
			}
		}
	}
}

func TestBuilderLinksNothingHeavy(t *testing.T) {
	if _, err := os.Stat("../cmd/kiln"); err != nil {
		t.Skip("no cmd/kiln")
	}
	for _, p := range list(t, "-deps", "./cmd/kiln") {
		for _, u := range unlinked {
			if under(p.ImportPath, u.prefix) {
				t.Errorf("cmd/kiln links %s: %s", p.ImportPath, u.why)
			}
		}
	}
}

func TestNoPackagesForAnything(t *testing.T) {
	for _, p := range list(t, "./...") {
		switch name := p.ImportPath[strings.LastIndex(p.ImportPath, "/")+1:]; name {
		case "util", "utils", "common", "helpers", "helper", "misc", "base", "shared":
			t.Errorf("%s: a package is named after what it knows, %q says nothing", p.ImportPath, name)
		}
	}
}

// TestRulesCanBeBroken shows that the rules notice what they are for.
func TestRulesCanBeBroken(t *testing.T) {
	for _, c := range []struct {
		from, to string
		wrong    bool
	}{
		{"internal/layer", module + "internal/tree", false},
		{"internal/tree", module + "internal/layer", true},
		{"internal/engine", module + "internal/registry/auth", true},
		{"internal/engine/llb", module + "internal/engine", false},
		{"internal/sandbox/gvisor/sentry", module + "internal/image", true},
		{"internal/sandbox/gvisor/sentry", "gvisor.dev/gvisor/pkg/sentry/kernel", false},
		{"internal/layer", "gvisor.dev/gvisor/pkg/erofs", true},
		{"internal/engine", "github.com/moby/buildkit/solver/pb", true},
		{"internal/registry/auth", "github.com/aws/aws-sdk-go-v2/config", true},
		{"internal/registry/auth/ecr", "github.com/aws/aws-sdk-go-v2/config", false},
		{"internal/engine/llb", "github.com/moby/buildkit/solver/pb", false},
		{"internal/newthing", module + "internal/diag", true},
		{"internal/build", module + "internal/cli", true},
		{"internal/build", module + "test/testenv", true},
	} {
		if got := check(c.from, c.to); (len(got) > 0) != c.wrong {
			t.Errorf("%s -> %s: %q, want wrong: %v", c.from, c.to, got, c.wrong)
		}
	}
}

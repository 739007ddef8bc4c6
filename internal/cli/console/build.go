package console

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/sandbox/gvisor"
)

// Env is what builds work with, but for Progress: the store that root or else the environment
// names, with its limit, and registries of which the hosts in insecure may be spoken to without TLS.
func (c *Console) Env(root, limit string, insecure []string) (build.Env, error) {
	return c.EnvWith(root, limit, registry.Options{Insecure: insecure})
}

// EnvWith is Env for who has more to say of registries.
func (c *Console) EnvWith(root, limit string, o registry.Options) (build.Env, error) {
	st, err := c.OpenStore(root)
	if err != nil {
		return build.Env{}, err
	}
	most, err := st.ParseLimit(cmp.Or(limit, c.Getenv("KILN_STORE_LIMIT")))
	if err != nil {
		return build.Env{}, err
	}
	reg, err := registry.New(o)
	if err != nil {
		return build.Env{}, err
	}
	return build.Env{Store: st, Registry: reg, Sandbox: gvisor.New(gvisor.Options{}), Stdout: c.Out, Environ: os.Environ(), Limit: most}, nil
}

// WriteMetadata writes what is known of a result to a file, as buildx does. Warnings are left out if
// there are none.
func WriteMetadata(file string, res *build.Result, warnings []progress.Finding) error {
	said, err := res.Metadata()
	if err != nil {
		return err
	}
	m := map[string]any{}
	for k, v := range said {
		m[k] = v
	}
	if res.Digest != "" {
		m["containerimage.descriptor"] = res.Descriptor // not in base64 here
	}
	if len(warnings) > 0 {
		var all []*progress.VertexWarning
		for _, w := range warnings {
			all = append(all, w.Warning())
		}
		m["buildx.build.warnings"] = all
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = WriteText(file, string(b)+"\n")
	}
	if err != nil {
		return fmt.Errorf("write --metadata-file: %w", err)
	}
	return nil
}

// WriteText writes a file that appears only when it is whole.
func WriteText(file, text string) error {
	return export.WriteFile(file, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
}

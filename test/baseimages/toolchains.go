package baseimages

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
)

const caBundle = "/etc/ssl/certs/ca-certificates.crt"

// certificates adds this machine's CA bundle, if it has one.
func (l *layerFile) certificates() error {
	b, err := os.ReadFile(caBundle)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return l.file(strings.TrimPrefix(caBundle, "/"), 0o644, b)
}

func goVersion(ctx context.Context) (string, error) {
	out, err := run(ctx, "", nil, "go", "env", "GOVERSION", "GOROOT", "GOPROXY", "GOSUMDB", "GONOSUMDB", "GOFLAGS")
	return out, err
}

func makeGolang(ctx context.Context, _ *Set, base v1.Image, tmp string) (v1.Image, error) {
	out, err := goVersion(ctx)
	if err != nil {
		return nil, err
	}
	f := strings.Split(out, "\n")
	if len(f) < 6 {
		return nil, fmt.Errorf("read go env: %q", out)
	}
	env := []string{
		"PATH=/go/bin:/usr/local/go/bin:" + strings.TrimPrefix(defaultPath, "PATH="),
		"GOLANG_VERSION=" + strings.TrimPrefix(f[0], "go"), "GOTOOLCHAIN=local", "GOPATH=/go",
	}
	for i, def := range map[int][2]string{
		2: {"GOPROXY", "https://proxy.golang.org,direct"}, 3: {"GOSUMDB", "sum.golang.org"}, 4: {"GONOSUMDB", ""}, 5: {"GOFLAGS", ""},
	} {
		if f[i] != def[1] {
			env = append(env, def[0]+"="+f[i])
		}
	}
	slices.Sort(env[4:])
	l, err := newLayer(tmp)
	if err != nil {
		return nil, err
	}
	if err := l.certificates(); err != nil {
		return nil, err
	}
	for _, d := range []string{"go", "go/src", "go/bin"} {
		if err := l.dir(d, 0o1777); err != nil {
			return nil, err
		}
	}
	if err := l.tree("usr/local/go", f[1], skipGo); err != nil {
		return nil, err
	}
	layer, err := l.done()
	if err != nil {
		return nil, err
	}
	return image(base, layer, "COPY /usr/local/go # "+f[0], func(c *v1.Config) {
		c.Env = env
		c.WorkingDir = "/go"
		if c.Cmd == nil {
			c.Cmd = []string{"sh"}
		}
	})
}

// skipGo leaves out what no build reads.
func skipGo(rel string) bool {
	switch rel {
	case "test", "doc", "api", "misc", ".git", "pkg/mod", "pkg/sumdb":
		return true
	}
	return filepath.Base(rel) == "testdata" || strings.HasSuffix(rel, "_test.go")
}

// nodeVersion is this machine's node and where it is, or nothing: then the
// image is made with Debian's, which is older.
func nodeVersion(ctx context.Context) (string, error) {
	if _, err := exec.LookPath("npm"); err != nil {
		return "", nil
	}
	return run(ctx, "", nil, "node", "-p", "process.version+' '+process.execPath")
}

func makeNode(ctx context.Context, _ *Set, base v1.Image, tmp string) (v1.Image, error) {
	out, err := nodeVersion(ctx)
	if err != nil {
		return nil, err
	}
	if out == "" {
		return makeDebianNode(ctx, tmp)
	}
	ver, prog, _ := strings.Cut(strings.TrimSpace(out), " ")
	root, err := run(ctx, "", nil, "npm", "root", "--global")
	if err != nil {
		return nil, err
	}
	npm, err := filepath.EvalSymlinks(filepath.Join(strings.TrimSpace(root), "npm"))
	if err != nil {
		return nil, err
	}
	registry, err := run(ctx, tmp, nil, "npm", "config", "get", "registry")
	if err != nil {
		return nil, err
	}
	l, err := newLayer(tmp)
	if err != nil {
		return nil, err
	}
	if err := l.node(base, prog, npm, strings.TrimSpace(registry)); err != nil {
		return nil, err
	}
	layer, err := l.done()
	if err != nil {
		return nil, err
	}
	return image(base, layer, "COPY node "+ver, func(c *v1.Config) {
		c.Env = []string{defaultPath, "NODE_VERSION=" + strings.TrimPrefix(ver, "v")}
		c.Cmd = []string{"node"}
	})
}

func (l *layerFile) node(base v1.Image, prog, npm, registry string) error {
	if err := l.certificates(); err != nil {
		return err
	}
	for _, add := range [][2]string{{"etc/passwd", "node:x:1000:1000::/home/node:/bin/bash\n"}, {"etc/group", "node:x:1000:\n"}} {
		b, err := readFile(base, add[0])
		if err != nil {
			return err
		}
		if err := l.file(add[0], 0o644, append(b, add[1]...)); err != nil {
			return err
		}
	}
	if err := l.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "home/node/", Mode: 0o755, Uid: 1000, Gid: 1000, ModTime: epoch()}); err != nil {
		return err
	}
	if err := l.copyIn("usr/local/bin/node", prog); err != nil {
		return err
	}
	none := func(string) bool { return false }
	if err := l.tree("usr/local/lib/node_modules/npm", npm, none); err != nil {
		return err
	}
	for _, n := range []string{"npm", "npx"} {
		if err := l.link(tar.TypeSymlink, "usr/local/bin/"+n, "../lib/node_modules/npm/bin/"+n+"-cli.js"); err != nil {
			return err
		}
	}
	return l.npmrc(registry)
}

func (l *layerFile) npmrc(registry string) error {
	rc := "update-notifier=false\n"
	if _, err := os.Stat(caBundle); err == nil {
		rc += "cafile=" + caBundle + "\n"
	}
	if registry != "https://registry.npmjs.org/" && registry != "undefined" {
		rc += "registry=" + registry + "\n"
	}
	return l.file("usr/local/etc/npmrc", 0o644, []byte(rc))
}

// makeDebianNode is for machines without node: one layer with Debian's nodejs and npm.
func makeDebianNode(ctx context.Context, tmp string) (v1.Image, error) {
	layer, err := bootstrap(ctx, tmp, "nodejs,npm,ca-certificates", func(l *layerFile) error {
		if err := l.certificates(); err != nil {
			return err
		}
		return l.npmrc("undefined")
	})
	if err != nil {
		return nil, err
	}
	return image(empty.Image, layer, "mmdebstrap --variant=minbase --include=nodejs,npm bookworm", func(c *v1.Config) {
		c.Env = []string{defaultPath, "NPM_CONFIG_GLOBALCONFIG=/usr/local/etc/npmrc"}
		c.Cmd = []string{"node"}
	})
}

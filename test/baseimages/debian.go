package baseimages

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func goarch() string { return runtime.GOARCH }

// hostSources is this machine's idea of where Debian's packages are, as
// deb822 sources for bookworm, and its network settings of apt.
func hostSources(ctx context.Context) (sources, conf string, err error) {
	mirror, security := "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
	out, err := run(ctx, "", nil, "apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(out) {
		switch f := strings.Fields(line); {
		case len(f) != 2:
		case f[1] == "bookworm":
			mirror = strings.TrimSuffix(f[0], "/")
		case f[1] == "bookworm-security":
			security = strings.TrimSuffix(f[0], "/")
		}
	}
	const key = "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
	sources = "Types: deb\nURIs: " + mirror + "\nSuites: bookworm bookworm-updates\nComponents: main\n" + key +
		"\nTypes: deb\nURIs: " + security + "\nSuites: bookworm-security\nComponents: main\n" + key
	out, err = run(ctx, "", nil, "apt-config", "dump")
	if err != nil {
		return "", "", err
	}
	var lines []string
	for line := range strings.Lines(out) {
		if keepAptOption(line) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	sort.Strings(lines)
	return sources, strings.Join(lines, "\n") + "\n", nil
}

// keepAptOption says whether a line of apt-config's dump is about reaching a mirror.
func keepAptOption(line string) bool {
	name, value, ok := strings.Cut(line, " ")
	if !ok || strings.TrimSpace(value) == `"";` {
		return false
	}
	n := strings.ToLower(name)
	for _, p := range []string{"acquire::http", "acquire::check", "acquire::retries", "acquire::forceipv"} {
		if strings.HasPrefix(n, p) {
			return true
		}
	}
	return false
}

func aptKey(ctx context.Context) (string, error) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return "", errors.New("needs Debian's apt-get")
	}
	s, c, err := hostSources(ctx)
	return s + c, err
}

// dockerFiles are what Docker's own Debian image adds to a minimal Debian.
func dockerFiles(conf string) map[string]string {
	return map[string]string{
		"etc/apt/apt.conf.d/90mirror": conf,
		"etc/apt/apt.conf.d/docker-clean": `DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
`,
		"etc/apt/apt.conf.d/docker-gzip-indexes": "Acquire::GzipIndexes \"true\";\n",
		"etc/apt/apt.conf.d/docker-no-languages": "Acquire::Languages \"none\";\n",
		"etc/dpkg/dpkg.cfg.d/docker-apt-speedup": "force-unsafe-io\n",
	}
}

func makeDebian(ctx context.Context, _ *Set, base v1.Image, tmp string) (v1.Image, error) {
	layer, err := bootstrap(ctx, tmp, "", func(*layerFile) error { return nil })
	if err != nil {
		return nil, err
	}
	return image(base, layer, "mmdebstrap --variant=minbase bookworm", func(c *v1.Config) {
		c.Env = []string{defaultPath}
		c.Cmd = []string{"bash"}
	})
}

// bootstrap makes a minimal Debian with the packages of include (separated by commas) as one layer.
func bootstrap(ctx context.Context, tmp, include string, extra func(*layerFile) error) (v1.Layer, error) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return nil, errors.New("needs mmdebstrap: scripts/deps.sh base")
	}
	sources, conf, err := hostSources(ctx)
	if err != nil {
		return nil, err
	}
	src := filepath.Join(tmp, "debian.sources")
	if err := os.WriteFile(src, []byte(sources), 0o644); err != nil {
		return nil, err
	}
	argv := []string{
		"mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=tar",
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=path-exclude=/usr/share/locale/*",
	}
	for line := range strings.Lines(conf) {
		argv = append(argv, "--aptopt="+strings.TrimSpace(line))
	}
	if include != "" {
		argv = append(argv, "--include="+include)
	}
	argv = append(argv, "bookworm", filepath.Join(tmp, "debian.tar"), src)
	if _, err := run(ctx, tmp, []string{fmt.Sprintf("SOURCE_DATE_EPOCH=%d", epoch().Unix())}, argv...); err != nil {
		return nil, err
	}
	l, err := newLayer(tmp)
	if err != nil {
		return nil, err
	}
	if err := l.debianTar(filepath.Join(tmp, "debian.tar")); err != nil {
		return nil, err
	}
	if err := l.debianExtras(sources, conf); err != nil {
		return nil, err
	}
	if err := extra(l); err != nil {
		return nil, err
	}
	return l.done()
}

func (l *layerFile) debianExtras(sources, conf string) error {
	files := dockerFiles(conf)
	files["etc/apt/sources.list.d/debian.sources"] = sources
	local, err := filepath.Glob("/usr/local/share/ca-certificates/*.crt") // update-ca-certificates takes them up
	if err != nil {
		return err
	}
	for _, c := range local {
		b, err := os.ReadFile(c)
		if err != nil {
			return err
		}
		files[path.Join("usr/local/share/ca-certificates", filepath.Base(c))] = string(b)
	}
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	sort.Strings(names)
	for _, n := range names {
		if err := l.file(n, 0o644, []byte(files[n])); err != nil {
			return err
		}
	}
	return l.file("usr/sbin/policy-rc.d", 0o755, []byte("#!/bin/sh\nexit 101\n"))
}

// debianTar copies mmdebstrap's tar but for what differs on every machine.
func (l *layerFile) debianTar(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		n := path.Clean(h.Name)
		if skipDebian(n) {
			continue
		}
		h.Name = n
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
			l.made[n] = true
		}
		h.Uname, h.Gname = "", ""
		if h.Typeflag == tar.TypeLink {
			h.Linkname = path.Clean(h.Linkname)
		}
		if err := l.w.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(l.w, r); err != nil {
			return err
		}
	}
}

func skipDebian(n string) bool {
	switch n {
	case ".", "etc/resolv.conf", "etc/hostname", "etc/apt/sources.list", "etc/apt/apt.conf.d/99mmdebstrap",
		"var/log/apt/term.log", "var/log/apt/history.log", "var/log/dpkg.log", "var/log/alternatives.log":
		return true
	}
	for _, p := range []string{"dev/", "var/cache/apt/", "var/lib/apt/lists/", "etc/apt/sources.list.d/"} {
		if strings.HasPrefix(n, p) {
			return true
		}
	}
	return false
}

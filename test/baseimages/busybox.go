package baseimages

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

const busyboxPasswd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
sys:x:3:3:sys:/dev:/bin/false
sync:x:4:100:sync:/bin:/bin/sync
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
`

const busyboxGroup = `root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
wheel:x:10:root
mail:x:8:
www-data:x:33:
operator:x:37:
users:x:100:
nobody:x:65534:
`

// busyboxProgram fetches Debian's static busybox without being root: apt keeps
// its state in a directory of ours.
func busyboxProgram(ctx context.Context, tmp string) (string, error) {
	if p, err := os.Stat("/usr/bin/busybox"); err == nil && p.Mode().IsRegular() {
		if _, err := run(ctx, tmp, nil, "dpkg-query", "-W", "busybox-static"); err == nil {
			return "/usr/bin/busybox", nil
		}
	}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(tmp, d), 0o755); err != nil {
			return "", err
		}
	}
	opts := []string{
		"-q", "-o", "Dir::State=" + filepath.Join(tmp, "state"), "-o", "Dir::State::status=/var/lib/dpkg/status",
		"-o", "Dir::Cache=" + filepath.Join(tmp, "cache"), "-o", "APT::Sandbox::User=root",
	}
	if _, err := run(ctx, tmp, nil, append(append([]string{"apt-get"}, opts...), "update")...); err != nil {
		return "", err
	}
	if _, err := run(ctx, tmp, nil, append(append([]string{"apt-get"}, opts...), "download", "busybox-static")...); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "busybox-static_*.deb"))
	if err != nil || len(debs) != 1 {
		return "", errors.New("download busybox-static: apt-get left no package")
	}
	if _, err := run(ctx, tmp, nil, "dpkg-deb", "-x", debs[0], filepath.Join(tmp, "busybox")); err != nil {
		return "", err
	}
	for _, p := range []string{"busybox/bin/busybox", "busybox/usr/bin/busybox"} {
		if _, err := os.Stat(filepath.Join(tmp, p)); err == nil {
			return filepath.Join(tmp, p), nil
		}
	}
	return "", errors.New("unpack busybox-static: no busybox in it")
}

func makeBusybox(ctx context.Context, _ *Set, base v1.Image, tmp string) (v1.Image, error) {
	prog, err := busyboxProgram(ctx, tmp)
	if err != nil {
		return nil, err
	}
	list, err := run(ctx, tmp, nil, prog, "--list")
	if err != nil {
		return nil, err
	}
	l, err := newLayer(tmp)
	if err != nil {
		return nil, err
	}
	if err := l.busybox(prog, strings.Fields(list)); err != nil {
		return nil, err
	}
	layer, err := l.done()
	if err != nil {
		return nil, err
	}
	return image(base, layer, "busybox-static of Debian bookworm", func(c *v1.Config) {
		c.Env = []string{defaultPath}
		c.Cmd = []string{"sh"}
	})
}

func (l *layerFile) busybox(prog string, applets []string) error {
	for _, d := range []struct {
		name string
		mode int64
	}{
		{"bin", 0o755},
		{"dev", 0o755},
		{"etc", 0o755},
		{"home", 0o755},
		{"root", 0o700},
		{"tmp", 0o1777},
		{"usr", 0o755},
		{"usr/bin", 0o755},
		{"usr/sbin", 0o755},
		{"var", 0o755},
		{"var/spool", 0o755},
		{"var/spool/mail", 0o755},
		{"var/www", 0o755},
	} {
		if err := l.dir(d.name, d.mode); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(prog)
	if err != nil {
		return err
	}
	if err := l.file("bin/busybox", 0o755, b); err != nil {
		return err
	}
	slices.Sort(applets)
	for _, a := range slices.Compact(applets) { // hard links, as the image on Docker Hub has them
		if a == "busybox" || strings.Contains(a, "/") {
			continue
		}
		if err := l.link(tar.TypeLink, "bin/"+a, "bin/busybox"); err != nil {
			return err
		}
	}
	if err := l.link(tar.TypeSymlink, "usr/bin/env", "../../bin/env"); err != nil {
		return err
	}
	if err := l.file("etc/passwd", 0o644, []byte(busyboxPasswd)); err != nil {
		return err
	}
	return l.file("etc/group", 0o644, []byte(busyboxGroup))
}

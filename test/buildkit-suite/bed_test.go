package buildkitsuite

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/kiln-build/kiln/internal/registryserver"
	"github.com/kiln-build/kiln/test/baseimages"
	"github.com/kiln-build/kiln/test/kilnrun"
	"github.com/kiln-build/kiln/test/refbuild"
	"github.com/kiln-build/kiln/test/testenv"
)

// bed is what BuildKit's harness needs around it.
type bed struct {
	bin    string // buildkitd, registry and buildctl
	mirror string // content of the registry that stands for Docker Hub
	tmp    string // other users can reach it
	logs   string
}

// daemon becomes Kiln under the name of buildkitd, as an ordinary user without privilege. The harness gives a
// directory that belongs to root.
const daemon = `#!/bin/bash
for ((i = 1; i < $#; i++)); do
  [ "${!i}" != --root ] || { j=$((i + 1)); chown -R %[1]d:%[1]d "${!j}"; }
done
exec %[2]q -uid %[1]d -gid %[1]d -env TMPDIR="$TMPDIR" -env PATH="$PATH" -- %[3]q "$@"
`

// registry answers to the command line of distribution's program, and says its address in the same way.
const registryProgram = `#!/bin/bash
dir=$(sed -n 's/^ *rootdirectory: //p' "$2")
exec %q registry --quiet --root "$dir" --addr 127.0.0.1:0 > >(exec sed -u 's/^Registry on /listening on /' >&2)
`

func newBed(t *testing.T) *bed {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp("", "kiln-suite-*") // short: sockets' paths are
	must(err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(os.Chmod(dir, 0o755))
	cache, err := testenv.CacheDir()
	must(err)
	b := &bed{bin: filepath.Join(dir, "bin"), mirror: filepath.Join(dir, "mirror"), tmp: filepath.Join(dir, "t"), logs: filepath.Join(cache, "buildkit-suite")}
	for _, d := range []string{b.bin, b.mirror, b.tmp, filepath.Join(dir, "kiln"), b.logs} {
		must(os.MkdirAll(d, 0o755))
	}
	must(os.Chmod(b.tmp, 0o777|os.ModeSticky))
	kiln, err := testenv.Kiln(t.Context())
	must(err)
	unpriv, err := testenv.Tool(t.Context(), "unpriv")
	must(err)
	oracle, err := refbuild.Programs(t.Context())
	must(err)
	own := filepath.Join(dir, "kiln", "buildkitd") // a program knows what it is to be by its name
	must(install(kiln, own))
	must(install(unpriv, filepath.Join(dir, "kiln", "unpriv")))
	must(install(filepath.Join(oracle, "buildctl"), filepath.Join(b.bin, "buildctl")))
	must(os.WriteFile(filepath.Join(b.bin, "buildkitd"), fmt.Appendf(nil, daemon, kilnrun.Nobody, filepath.Join(dir, "kiln", "unpriv"), own), 0o755))
	must(os.WriteFile(filepath.Join(b.bin, "registry"), fmt.Appendf(nil, registryProgram, kiln), 0o755))
	must(b.images(t, cache))
	return b
}

func install(from, to string) error {
	data, err := os.ReadFile(from) // the repository may be where another user cannot go
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o755)
}

// adduser is the part of Docker Hub's busybox that Debian's lacks and the tests use.
const adduser = `#!/bin/sh
[ "$1" = -D ] && [ $# = 2 ] || { echo "usage: adduser -D NAME" >&2; exit 1; }
id=$((1000 + $(grep -c '^[^:]*:x:1[0-9][0-9][0-9]:' /etc/passwd)))
echo "$2:x:$id:$id::/home/$2:/bin/sh" >> /etc/passwd
echo "$2:x:$id:" >> /etc/group
mkdir -p "/home/$2" && chown "$id:$id" "/home/$2"
`

// images fills the registry that stands for Docker Hub with all that the tests look for there: what is
// not there makes tests fail that do not need it.
func (b *bed) images(t *testing.T, cache string) error {
	set := baseimages.Open(cache, t.Output())
	if err := set.Ensure(t.Context()); err != nil {
		return err
	}
	busybox, err := set.Image("library/busybox:latest")
	if err != nil {
		return err
	}
	debian, err := set.Image("library/debian:bookworm")
	if err != nil {
		return err
	}
	if busybox, err = withFile(busybox, "bin/adduser", 0o755, adduser); err != nil {
		return err
	}
	if busybox, err = squash(busybox); err != nil {
		return err
	}
	alpine, err := withDirs(busybox, "proc", "sys") // which the real one has, and a RUN step would make
	if err != nil {
		return err
	}
	if alpine, err = withFile(alpine, "etc/alpine-release", 0o644, "3.23.0\n"); err != nil {
		return err
	}
	if alpine, err = withFile(alpine, "sbin/apk", 0o755, "#!/bin/sh\necho 'apk: there is no network here' >&2\nexit 127\n"); err != nil {
		return err
	}
	srv, err := registryserver.Start(registryserver.Options{Root: filepath.Join(b.mirror, "data"), Addr: "127.0.0.1:0"})
	if err != nil {
		return err
	}
	defer srv.Close()
	for repo, img := range map[string]v1.Image{
		"library/busybox:latest":              busybox,
		"library/busybox:stable-musl":         busybox,
		"library/busybox_amd64:latest":        busybox,
		"library/alpine:latest":               alpine,
		"amd64/debian:bullseye-20230109-slim": debian,
		"tonistiigi/test:nolayers":            empty.Image,
		"tonistiigi/hellofs:latest":           busybox,
		"cpuguy83/buildkit-foreign:latest":    empty.Image,
	} {
		ref, err := name.ParseReference(srv.Addr()+"/"+repo, name.Insecure)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, img, remote.WithContext(t.Context())); err != nil {
			return fmt.Errorf("push %s: %w", repo, err)
		}
	}
	return nil
}

// squash puts an image's files into one layer: Docker Hub's busybox has one, and tests count.
func squash(img v1.Image) (v1.Image, error) {
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return mutate.Extract(img), nil })
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.RootFS, cfg.History = v1.RootFS{Type: "layers"}, nil
	scratch, err := mutate.ConfigFile(empty.Image, cfg)
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(scratch, layer)
}

// withFile is an image with one file more.
func withFile(base v1.Image, path string, mode int64, content string) (v1.Image, error) {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode, Size: int64(len(content)), ModTime: fileTime()}
	return withEntries(base, content, h)
}

// withDirs is an image with empty directories more.
func withDirs(base v1.Image, paths ...string) (v1.Image, error) {
	var hs []*tar.Header
	for _, p := range paths {
		hs = append(hs, &tar.Header{Typeflag: tar.TypeDir, Name: p + "/", Mode: 0o755, ModTime: fileTime()})
	}
	return withEntries(base, "", hs...)
}

// fileTime is when the entries that are added were made.
func fileTime() time.Time { return time.Unix(1767225600, 0) }

// withEntries is an image with one layer more; content is that of the entries that are files.
func withEntries(base v1.Image, content string, hs ...*tar.Header) (v1.Image, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range hs {
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, content); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(base, layer)
}

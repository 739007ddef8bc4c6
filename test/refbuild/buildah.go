package refbuild

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// BuildahVersion is that of Debian 12. What another one makes of a Dockerfile is another opinion.
const BuildahVersion = "1.28"

// Buildah is Debian's buildah with storage and settings of its own: nothing of
// the machine's /etc/containers or /var/lib/containers is read or written.
// Several builds may run at once. It takes root, and Debian's runc.
type Buildah struct {
	dir string
}

// OpenBuildah prepares storage in a new directory below parent, which must be on
// a file system that overlayfs can write to (a container's /tmp often is not), for
// builds from and to plain-HTTP registries.
func OpenBuildah(ctx context.Context, parent string, hosts ...string) (*Buildah, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("open buildah: needs root")
	}
	out, err := exec.CommandContext(ctx, "buildah", "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("open buildah: %w: scripts/deps.sh oracle", err)
	}
	if !strings.HasPrefix(string(out), "buildah version "+BuildahVersion+".") {
		return nil, fmt.Errorf("open buildah: needs version %s, Debian 12's: this is %s", BuildahVersion, strings.TrimSpace(string(out)))
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(parent, ".storage-*")
	if err != nil {
		return nil, err
	}
	b := &Buildah{dir: dir}
	if err := b.settings(hosts); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func (b *Buildah) settings(hosts []string) error {
	if err := os.Mkdir(b.path("tmp"), 0o711); err != nil {
		return err
	}
	registries := "unqualified-search-registries = []\n"
	for _, h := range hosts {
		registries += fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", h)
	}
	storage := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n",
		b.path("storage"), b.path("run"))
	for name, text := range map[string]string{
		"registries.conf": registries, "storage.conf": storage, "containers.conf": "",
		"policy.json": `{"default": [{"type": "insecureAcceptAnything"}]}`, "auth.json": "{}",
	} {
		if err := os.WriteFile(b.path(name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (b *Buildah) path(name string) string { return filepath.Join(b.dir, name) }

// Build builds a context directory and pushes the image to ref. Flags are those
// of buildah build, which has most of docker build's. It returns what buildah printed;
// the error is ErrBuild if buildah ran and could not build it.
func (b *Buildah) Build(ctx context.Context, contextDir, ref string, flags ...string) (string, error) {
	// docker's format, because OCI's config has no HEALTHCHECK, SHELL or ONBUILD.
	args := append([]string{
		"build", "--signature-policy", b.path("policy.json"), "--format", "docker", "--layers", "--no-cache",
		"--isolation", "oci", "--http-proxy=false", "--identity-label=false", "-t", ref,
	}, flags...)
	out, err := b.run(ctx, append(args, contextDir)...)
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		return out, fmt.Errorf("%w: %w", ErrBuild, err)
	}
	if err != nil {
		return out, fmt.Errorf("run buildah: %w", err)
	}
	if out, err := b.run(ctx, "push", "--signature-policy", b.path("policy.json"), ref); err != nil {
		return out, fmt.Errorf("push what buildah built: %w\n%s", err, out)
	}
	return out, nil
}

func (b *Buildah) run(ctx context.Context, args ...string) (string, error) {
	// In a mount namespace of its own, for builds that fail leave their containers mounted.
	cmd := exec.CommandContext(ctx, "unshare", append([]string{"--mount", "buildah"}, args...)...)
	cmd.Dir = b.dir
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + b.dir, "TMPDIR=" + b.path("tmp"), "XDG_RUNTIME_DIR=" + b.path("run"),
		"CONTAINERS_CONF=" + b.path("containers.conf"), "CONTAINERS_STORAGE_CONF=" + b.path("storage.conf"),
		"CONTAINERS_REGISTRIES_CONF=" + b.path("registries.conf"), "REGISTRY_AUTH_FILE=" + b.path("auth.json"),
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// BuildahPlaces are where buildah supplies files to RUN steps, which stay in
// its layers as empty files, and which a comparison leaves out.
func BuildahPlaces() []string {
	return []string{"/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/run"}
}

// Close removes the storage.
func (b *Buildah) Close() error { return os.RemoveAll(b.dir) }

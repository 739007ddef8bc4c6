package git

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
)

const (
	maxStdout = 64 << 20
	maxStderr = 64 << 10
)

// cli runs git, with nothing of the world around it but what it needs.
type cli struct {
	bin     string
	dir     string
	env     []string
	conf    [][2]string
	secrets []string // never to be shown
}

func newCLI(ctx context.Context, o Options, home, work string) (*cli, error) {
	bin, err := lookPath(o.Env)
	if err != nil {
		return nil, err
	}
	c := &cli{bin: bin, dir: work}
	for _, name := range []string{
		"PATH", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
		"SSH_AUTH_SOCK", "GIT_SSL_CAINFO", "GIT_SSL_CAPATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "GIT_EXEC_PATH",
	} {
		if v := getenv(o.Env, name); v != "" {
			c.env = append(c.env, name+"="+v)
		}
	}
	ssh := getenv(o.Env, "GIT_SSH_COMMAND")
	if ssh == "" {
		ssh = sshCommand(o.KnownHosts)
	}
	c.env = append(c.env,
		"HOME="+home, "XDG_CONFIG_HOME="+home, "TMPDIR="+home, "GIT_TEMPLATE_DIR="+home,
		"LC_ALL=C", // messages are looked at
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL="+os.DevNull, "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS_REQUIRE=never",
		"GIT_ALLOW_PROTOCOL=http:https:ssh:git", "GIT_LFS_SKIP_SMUDGE=1",
		"GIT_SSH_COMMAND="+ssh,
	)
	for _, kv := range [][2]string{
		{"core.hooksPath", os.DevNull},
		{"core.fsmonitor", "false"},
		{"core.attributesFile", os.DevNull},
		{"core.autocrlf", "false"},
		{"core.symlinks", "true"},
		{"credential.helper", ""},
		{"safe.directory", "*"},
		{"init.defaultBranch", "master"},
		{"protocol.version", "2"},
		{"gc.auto", "0"},
		{"maintenance.auto", "false"},
		{"http.lowSpeedLimit", "1000"},
		{"http.lowSpeedTime", "60"},
	} {
		c.config(kv[0], kv[1])
	}
	return c, c.checkVersion(ctx)
}

// lookPath finds git in the PATH that it will have itself.
func lookPath(env []string) (string, error) {
	for _, dir := range filepath.SplitList(getenv(env, "PATH")) {
		if !filepath.IsAbs(dir) {
			continue
		}
		name := filepath.Join(dir, "git")
		if fi, err := os.Stat(name); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return name, nil
		}
	}
	return "", diag.New(diag.ExitFailure, "fetch git repository: there is no git program in PATH").
		WithHint("Install git, or give the context as an archive, such as https://HOST/OWNER/REPO/archive/REF.tar.gz.")
}

// checkVersion refuses versions that take no configuration from their
// environment: they would take ours for nothing.
func (c *cli) checkVersion(ctx context.Context) error {
	out, err := c.run(ctx, "version")
	if err != nil {
		return fmt.Errorf("run git: %w", err)
	}
	m := regexp.MustCompile(`(\d+)\.(\d+)`).FindStringSubmatch(out)
	if m == nil {
		return fmt.Errorf("run git: its version is %q", strings.TrimSpace(out))
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	if major < 2 || major == 2 && minor < 32 {
		return diag.New(diag.ExitFailure, "fetch git repository: git %s.%s is too old", m[1], m[2]).WithHint("Install git 2.32 or newer.")
	}
	return nil
}

func getenv(env []string, name string) string {
	for _, kv := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// sshCommand is how git is to call ssh, for a shell.
func sshCommand(knownHosts string) string {
	s := "ssh -o BatchMode=yes -o ConnectTimeout=30"
	if knownHosts == "" {
		return s + " -o StrictHostKeyChecking=accept-new"
	}
	quoted := "'" + strings.ReplaceAll(knownHosts, "'", `'\''`) + "'"
	return s + " -o StrictHostKeyChecking=yes -o UserKnownHostsFile=" + quoted
}

func (c *cli) config(key, value string) { c.conf = append(c.conf, [2]string{key, value}) }

// run runs a git command and returns what it writes.
func (c *cli) run(ctx context.Context, args ...string) (string, error) {
	var out bytes.Buffer
	err := c.stream(ctx, func(r *bufio.Reader) error {
		_, err := io.Copy(&out, io.LimitReader(r, maxStdout))
		return err
	}, args...)
	return out.String(), err
}

// stream runs a git command and has read read what it writes. If that fails,
// git is killed.
func (c *cli) stream(ctx context.Context, read func(*bufio.Reader) error, args ...string) error {
	runCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(runCtx, c.bin, args...)
	cmd.Dir, cmd.Env = c.dir, append(slices.Clone(c.env), "GIT_CONFIG_COUNT="+strconv.Itoa(len(c.conf)))
	for i, kv := range c.conf {
		cmd.Env = append(cmd.Env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, kv[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, kv[1]))
	}
	// Git has helpers, which would outlive it: all of its group is to end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	stderr := &tail{max: maxStderr}
	cmd.Stderr = stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("run git: %w", err)
	}
	rerr := read(bufio.NewReaderSize(stdout, 64<<10))
	if rerr != nil {
		cancel()
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("git %s: %w", args[0], context.Cause(ctx))
	case rerr != nil:
		return rerr
	case err != nil:
		return &commandError{name: args[0], err: err, stderr: c.redact(stderr.String())}
	}
	return nil
}

// userInfo finds what may be credentials in URLs.
var userInfo = regexp.MustCompile(`://[^/@\s]+@`)

func (c *cli) redact(s string) string {
	for _, secret := range c.secrets {
		if secret != "" {
			s = strings.ReplaceAll(s, secret, "xxxxx")
		}
	}
	// What the server says is in there too: nothing that a terminal would obey.
	s = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	return userInfo.ReplaceAllString(s, "://xxxxx@")
}

// commandError is a git command that failed.
type commandError struct {
	name   string
	err    error
	stderr string
}

func (e *commandError) Error() string {
	msg := strings.TrimSpace(e.stderr)
	if msg == "" {
		return fmt.Sprintf("git %s: %v", e.name, e.err)
	}
	return fmt.Sprintf("git %s: %s", e.name, msg)
}

func (e *commandError) Unwrap() error { return e.err }

// tail keeps the end of what is written to it.
type tail struct {
	b   []byte
	max int
}

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - t.max; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }

// hint says what to do about an error, if that is known.
func hint(err error) string {
	switch {
	case stderrHas(err, "terminal prompts disabled", "Authentication failed", "returned error: 403", "returned error: 401"):
		return "If the repository is private, give a token: a secret GIT_AUTH_TOKEN, or https://USER:TOKEN@HOST/….git."
	case stderrHas(err, "Permission denied (publickey", "Host key verification failed"):
		return "Give an ssh key with an ssh agent (SSH_AUTH_SOCK) or with GIT_SSH_COMMAND, and the host's key in known_hosts."
	case stderrHas(err, "cannot run ssh"):
		return "Install ssh, or use an https URL."
	}
	return ""
}

// withHint adds a hint to an error that has one coming.
func withHint(err error) error {
	var d *diag.Error
	if err == nil || errors.As(err, &d) {
		return err
	}
	if h := hint(err); h != "" {
		return &diag.Error{Err: err, Hint: h}
	}
	return err
}

package e2e

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/test/kilnrun"
)

// secretive has steps that are given secrets and print them in every way they can think of, and one
// that looks for what is left of them. What it looks for is spelt backwards.
const secretive = `ARG REGISTRY
FROM ${REGISTRY}/library/debian:bookworm
COPY pattern /pattern
RUN --mount=type=secret,id=file --mount=type=secret,id=env,env=SECRET --mount=type=secret,id=key,target=/root/.key \
  cat /run/secrets/file /root/.key; echo "1 $SECRET 2 ${SECRET}${SECRET}"; cat /run/secrets/file >&2; env; set; cat /proc/self/environ; \
  for i in $(seq 1 ${#SECRET}); do printf %s "$(echo "$SECRET" | cut -c $i)"; done; echo; \
  printf %s "$(head -c 9 /run/secrets/file)"; sleep 0.3; tail -c +10 /run/secrets/file; test "$(wc -l < /root/.key)" = 4 && echo all there
RUN --mount=type=cache,target=/c --mount=type=secret,id=env,env=SECRET echo "cached $SECRET"; wc -c < /proc/self/environ > /c/size
RUN rev /pattern > /dev/shm/pattern; rm /pattern; env; cat /proc/*/environ /proc/*/cmdline | tr '\0' '\n'; ls -A /run/secrets /c /root/.key 2>&1; \
  find / -xdev -type f -print0 | xargs -0 grep -a -l -F -f /dev/shm/pattern; rm /dev/shm/pattern; echo searched
`

// stepSecrets plants secrets, and returns the options that pass them.
func stepSecrets(t *testing.T, bed *kilnrun.Bed, c canaries) []string {
	t.Helper()
	dir := filepath.Join(bed.Work, "secrets")
	files{
		"file": c.plant("the secret file") + "\n",
		"key":  "-----BEGIN KEY-----\n" + c.plant("the first line of a key") + "\n  " + c.plant("the second line of a key") + "\n-----END KEY-----\n",
	}.write(t, dir)
	if err := kilnrun.Own(dir); err != nil {
		t.Fatal(err)
	}
	bed.Env = append(bed.Env, "BUILD_SECRET="+c.plant("the secret variable"))
	return []string{"--secret", "id=file,src=" + filepath.Join(dir, "file"), "--secret", "id=env,env=BUILD_SECRET", "--secret", "id=key,src=" + filepath.Join(dir, "key")}
}

func reversed(c canaries) string {
	var lines []string
	for s := range c {
		lines = append(lines, reverse(s))
	}
	return strings.Join(lines, "\n") + "\n"
}

// TestStepSecrets: what a step is passed as a secret is masked in what it prints, in every kind of progress,
// gone for the next step, and nowhere in the image, the registry, the store, or what Kiln tells of them.
func TestStepSecrets(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, debian)
	c := canaries{}
	args := stepSecrets(t, bed, c)
	dir := files{"Dockerfile": secretive, "pattern": reversed(c)}.write(t, filepath.Join(bed.Dir, "context"))
	ref := bed.Host + "/step-secrets:1"
	for _, mode := range []string{"plain", "json", "rawjson", "tty"} {
		all := append([]string{"build", "--no-cache", "--progress", mode, "--push", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=" + bed.Host, "-t", ref}, args...)
		all = append(all, dir)
		if mode == "tty" {
			c.find(t, "progress on a terminal", onTerminal(t, bed, all...))
			continue
		}
		out, code := run(t, bed.Runner, all...)
		if code != 0 {
			t.Fatalf("%s: exit code %d\n%s", mode, code, out)
		}
		text := out
		switch mode {
		case "json":
			text = stepOutput(t, out)
		case "rawjson":
			text = rawOutput(t, out)
		}
		c.find(t, "progress "+mode, out+text)
		for _, s := range []string{"1 *** 2 ******", "SECRET=***", "cached ***", "all there", "searched"} {
			if !strings.Contains(text, s) {
				t.Errorf("progress %s has no %q:\n%s", mode, s, text)
			}
		}
	}
	for _, args := range [][]string{
		append(append([]string{"build", "--print=plan", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=" + bed.Host}, args...), dir),
		append(append([]string{"build", "-q", "-t", "secretive", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=" + bed.Host}, args...), dir),
		{"history", "--no-trunc", "secretive"},
		{"inspect", "secretive"},
		{"info"},
	} {
		out, code := run(t, bed.Runner, args...)
		if code != 0 {
			t.Errorf("%s: exit code %d\n%s", args[0], code, out)
		}
		c.find(t, "kiln "+args[0], out)
	}
	noSecretBelow(t, c, bed.Store(), filepath.Join(bed.Dir, "registry"))
	for p, e := range rootfs(t, ref) {
		c.find(t, "the image's "+p, e.Data)
	}
}

// onTerminal runs kiln on a terminal, and returns all that it shows there.
func onTerminal(t *testing.T, bed *kilnrun.Bed, args ...string) string {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("no terminals: ", err)
	}
	defer ours.Close()
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	shown := make(chan string)
	go func() {
		b, _ := io.ReadAll(ours) // its error is the end
		shown <- string(b)
	}()
	cmd := bed.Command(t.Context(), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	err = cmd.Run()
	theirs.Close()
	out := <-shown
	if err != nil || !strings.Contains(out, "RUN") {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// rawOutput is what the steps printed, from progress as BuildKit's clients take it.
func rawOutput(t *testing.T, out string) string {
	t.Helper()
	var b strings.Builder
	for line := range strings.Lines(out) {
		var s struct{ Logs []struct{ Data string } }
		if json.Unmarshal([]byte(line), &s) != nil {
			continue
		}
		for _, l := range s.Logs {
			d, err := base64.StdEncoding.DecodeString(l.Data)
			if err != nil {
				t.Error(err)
			}
			b.Write(d)
		}
	}
	return b.String()
}

// noSecretBelow looks into every file below directories; layers are compressed, and looked into elsewhere.
func noSecretBelow(t *testing.T, c canaries, dirs ...string) {
	t.Helper()
	n := 0
	for _, dir := range dirs {
		if err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(p)
			c.find(t, p, string(b))
			n++
			return err
		}); err != nil {
			t.Error(err)
		}
	}
	if n < 5 {
		t.Errorf("only %d files were looked into", n)
	}
}

// TestStepSecretsOfFailingStep: neither what a failing step prints nor the error has a secret.
func TestStepSecretsOfFailingStep(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	c := canaries{}
	args := stepSecrets(t, bed, c)
	dir := files{"Dockerfile": "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\n" +
		"RUN --mount=type=secret,id=env,env=SECRET echo before $SECRET; $SECRET; kill -9 $$\n"}.write(t, filepath.Join(bed.Dir, "context"))
	_, out, code := bed.TryBuild(t, dir, "failing-secret", args...)
	if code != diag.ExitStep || !strings.Contains(out, "before ***") || !strings.Contains(out, "***: not found") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	c.find(t, "the output", out)
	// Not passed at all: it says how.
	_, out, code = bed.TryBuild(t, files{"Dockerfile": "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\n" +
		"RUN --mount=type=secret,id=other,required true\n"}.write(t, filepath.Join(bed.Dir, "context2")), "missing-secret", args...)
	if code != diag.ExitDockerfile || !strings.Contains(out, `secret other: not found`) || !strings.Contains(out, "--secret id=other,src=FILE") || !strings.Contains(out, "Dockerfile:3") {
		t.Errorf("exit code %d\n%s", code, out)
	}
	noSecretBelow(t, c, bed.Store(), filepath.Join(bed.Dir, "registry"))
}

// TestStepSecretsNotOnDisk: while a step has secrets, no file on a disk that its sandbox or the builder
// has open has them: not the one that takes what the step writes, nor one without a name.
func TestStepSecretsNotOnDisk(t *testing.T) {
	guard(t)
	if os.Geteuid() != 0 {
		t.Skip("other users' descriptors can only be looked into by root")
	}
	bed := kilnrun.Open(t, busybox)
	c := canaries{}
	args := stepSecrets(t, bed, c)
	dir := files{"Dockerfile": "ARG REGISTRY\nFROM ${REGISTRY}/library/busybox:latest\n" +
		"RUN --mount=type=secret,id=env,env=SECRET --mount=type=secret,id=file --mount=type=cache,target=/c dd if=/dev/zero of=/c/x bs=1k count=100 2>/dev/null; echo marker-of-what-is-on-disk > /x; cp /c/x /y; cat /run/secrets/file > /dev/null; echo ready; sleep 5\n"}.write(t, filepath.Join(bed.Dir, "context"))
	all := append([]string{"build", "--progress", "plain", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=" + bed.Host}, args...)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := bed.Command(ctx, append(all, dir)...)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var looked string
	for sc := bufio.NewScanner(stderr); sc.Scan(); {
		if strings.HasSuffix(sc.Text(), " ready") {
			looked = lookIntoOpenFiles(t, bed, c)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(looked, "marker-of-what-is-on-disk") {
		t.Errorf("the file that takes what the step writes was not looked into, in %d bytes", len(looked))
	}
}

// lookIntoOpenFiles looks into what the builder's processes have open on a disk, and returns it.
func lookIntoOpenFiles(t *testing.T, bed *kilnrun.Bed, c canaries) string {
	t.Helper()
	var all strings.Builder
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		proc := filepath.Dir(filepath.Dir(fd))
		exe, _ := os.Readlink(filepath.Join(proc, "exe"))
		to, err := os.Readlink(fd)
		if exe != bed.Bin || err != nil || !strings.HasPrefix(to, bed.Work) {
			continue // of others; or memory, a pipe, a socket
		}
		if fi, err := os.Stat(fd); err != nil || !fi.Mode().IsRegular() {
			continue
		}
		b, err := os.ReadFile(fd)
		if err != nil {
			t.Error(err)
		}
		c.find(t, to, string(b))
		all.Write(b)
	}
	return all.String()
}

// TestStepAgent: a step can have an agent sign, and has its keys nowhere.
func TestStepAgent(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, debian)
	key := filepath.Join(bed.Work, "key")
	if out, err := exec.CommandContext(t.Context(), "openssl", "genpkey", "-algorithm", "ed25519", "-out", key).CombinedOutput(); err != nil {
		t.Skipf("openssl: %v\n%s", err, out)
	}
	if err := kilnrun.Own(bed.Work); err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	c := canaries{strings.Split(string(pem), "\n")[1]: "the key"}
	der, err := base64.StdEncoding.DecodeString(strings.Split(string(pem), "\n")[1])
	if err != nil {
		t.Fatal(err)
	}
	c[string(der[len(der)-32:])] = "the key's bytes"
	dir := files{"Dockerfile": `ARG REGISTRY
FROM ${REGISTRY}/library/debian:bookworm
COPY sign /sign
RUN --mount=type=ssh perl /sign $SSH_AUTH_SOCK > /signed; cat /signed
RUN ls /run/buildkit; echo "after $SSH_AUTH_SOCK"; cat /proc/mounts /proc/net/unix
`, "sign": `use Socket;
sub ask { my ($q) = @_; syswrite(S, pack("N/a", $q)); my ($n, $b) = ("", ""); sysread(S, $n, 4); while (length($b) < unpack("N", $n)) { sysread(S, $b, unpack("N", $n) - length($b), length($b)) or die "cut off" } return $b }
for (1..3) {
  socket(S, AF_UNIX, SOCK_STREAM, 0) and connect(S, pack_sockaddr_un($ARGV[0])) or die "$!";
  my ($type, $count, $blob) = unpack("CNN/a", ask(pack("C", 11)));
  my ($t, $sig) = unpack("CN/a", ask(pack("CN/aN/aN", 13, $blob, "text", 0)));
  my ($add) = unpack("C", ask(pack("C", 19)));
  printf "%d keys, answer %d, signature of %d bytes, remove all: %d\n", $count, $t, length($sig), $add;
}
`}.write(t, filepath.Join(bed.Dir, "context"))
	ref, out := bed.Build(t, dir, "agent", "--ssh", "default="+key)
	if n := strings.Count(out, "1 keys, answer 14, signature of 83 bytes, remove all: 5"); n != 3 {
		t.Errorf("%d signatures", n)
	}
	if !strings.Contains(out, "after \n") || strings.Contains(out, "ssh_agent") {
		t.Errorf("the next step sees the agent:\n%s", out)
	}
	c.find(t, "the output", out)
	noSecretBelow(t, c, bed.Store(), filepath.Join(bed.Dir, "registry"))
	for p, e := range rootfs(t, ref) {
		c.find(t, "the image's "+p, e.Data)
	}
}

// TestCacheMountsSurviveKills: builds that use a cache mount are killed at any moment; the
// next one finds a cache that works, with all that finished builds left in it.
func TestCacheMountsSurviveKills(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	dir := files{"Dockerfile": `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest
ARG N
RUN --mount=type=cache,target=/c,sharing=SHARING echo $N > /c/$N && head -c 300000 /dev/urandom > /c/big$N && for f in /c/[0-9]*; do test "/c/$(cat $f)" = $f || exit 9; done; ls /c | grep -v big | tr '\n' ' ' > /seen; cat /seen
`}.write(t, filepath.Join(bed.Dir, "context"))
	for _, sharing := range []string{"shared", "locked"} {
		b, err := os.ReadFile(filepath.Join(dir, "Dockerfile"))
		if err != nil {
			t.Fatal(err)
		}
		d := files{"Dockerfile": strings.ReplaceAll(string(b), "SHARING", sharing)}.write(t, filepath.Join(bed.Dir, sharing))
		args := func(n string) []string {
			return []string{"build", "--progress", "plain", "--insecure-registry", bed.Host, "--build-arg", "REGISTRY=" + bed.Host, "--build-arg", "N=" + n, d}
		}
		var done []string
		for i := range 12 {
			n := string(rune('a'+i)) + sharing
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond+time.Duration(i)*60*time.Millisecond)
			cmd := bed.Command(ctx, args("1"+n)...)
			if err := cmd.Run(); err == nil {
				done = append(done, "1"+n)
			}
			cancel()
			if i%4 == 3 {
				out, code := run(t, bed.Runner, args("2"+n)...)
				if code != 0 {
					t.Fatalf("exit code %d\n%s", code, out)
				}
				done = append(done, "2"+n)
				for _, have := range done {
					if !strings.Contains(out, have+" ") {
						t.Errorf("%s is lost:\n%s", have, out)
					}
				}
			}
		}
		t.Logf("%s: %d of 15 builds were done", sharing, len(done))
	}
	if out, code := run(t, bed.Runner, "prune", "-f"); code != 0 {
		t.Errorf("prune: %s", out)
	}
}

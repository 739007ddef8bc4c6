package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/test/kilnrun"
)

const (
	busybox = "library/busybox:latest"
	debian  = "library/debian:bookworm"
)

// rootWork does what root does in a Debian image: each line is a RUN step that
// checks its own work.
const rootWork = `ARG REGISTRY
FROM ${REGISTRY}/library/debian:bookworm
RUN test "$(id -u):$(id -g)" = 0:0 && test "$(id -un)" = root
RUN groupadd -g 4321 crew && useradd -m -u 1234 -g crew -s /bin/sh worker && test "$(id worker)" = "uid=1234(worker) gid=4321(crew) groups=4321(crew)"
RUN su worker -c 'id -u > ~/who' && test "$(cat /home/worker/who)" = 1234 && test "$(stat -c %U:%G /home/worker/who)" = worker:crew
RUN su worker -c 'touch /root/no 2>/dev/null' && exit 1 || su - worker -c 'test "$PWD" = /home/worker'
RUN mkdir /w && echo a > /w/a && chown worker:crew /w/a && chown -h 77:88 /w && ln -s a /w/s && chown -h 5:6 /w/s
RUN mknod /w/null c 1 3 && mknod /w/blk b 7 200 && mkfifo /w/fifo && echo gone > /w/null && test ! -s /w/null
RUN cp /bin/true /w/suid && chmod u+s,g+s /w/suid && chmod +t /w && test "$(stat -c %a /w/suid)" = 6755
RUN ln /w/a /w/hard && test "$(stat -c %h /w/a)" = 2 && ln -sfn nowhere /w/dangling
RUN echo '#!/bin/sh' > /w/setid.sh && cp /usr/bin/id /w/id && chown worker /w/id && chmod u+s /w/id && test "$(/w/id -u)" = 1234
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends libcap2-bin cron openssh-server python3-venv
RUN test -x /usr/sbin/sshd && test -s /etc/ssh/ssh_host_ed25519_key && getent passwd sshd && dpkg --audit && test -z "$(dpkg -l | grep '^i[^i]')"
RUN cp /bin/ping /w/ping 2>/dev/null || cp /bin/true /w/ping; setcap cap_net_raw+ep /w/ping && test "$(getcap /w/ping)" = "/w/ping cap_net_raw=ep"
RUN getcap /w/ping | grep -q cap_net_raw=ep
RUN python3 -m venv /venv && /venv/bin/python -c 'import sys; assert sys.prefix == "/venv"; print(sys.version)' && /venv/bin/pip --version
USER worker
WORKDIR /home/worker
RUN test "$(id -u)" = 1234 && test "$HOME" = /home/worker && touch mine && test "$(stat -c %u mine)" = 1234
`

// TestRootInside: what build steps do as root, they can do.
func TestRootInside(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, debian)
	dir := files{"Dockerfile": rootWork}.write(t, filepath.Join(bed.Dir, "context"))
	ref, out := bed.Build(t, dir, "root-inside")
	noPanic(t, out)
	fs := rootfs(t, ref)
	for p, is := range map[string]func(e entry) bool{
		"/home/worker/who":  func(e entry) bool { return e.Uid == 1234 && e.Gid == 4321 && e.Data == "1234\n" },
		"/home/worker/mine": func(e entry) bool { return e.Uid == 1234 && e.Gid == 4321 },
		"/w":                func(e entry) bool { return e.Uid == 77 && e.Gid == 88 && e.Mode&0o7777 == 0o1755 },
		"/w/s":              func(e entry) bool { return e.Uid == 5 && e.Gid == 6 && e.Linkname == "a" },
		"/w/null":           func(e entry) bool { return e.Typeflag == '3' && e.Devmajor == 1 && e.Devminor == 3 },
		"/w/blk":            func(e entry) bool { return e.Typeflag == '4' && e.Devmajor == 7 && e.Devminor == 200 },
		"/w/fifo":           func(e entry) bool { return e.Typeflag == '6' },
		"/w/suid":           func(e entry) bool { return e.Mode&0o7777 == 0o6755 && e.Uid == 0 },
		"/w/ping":           func(e entry) bool { return e.PAXRecords["SCHILY.xattr.security.capability"] != "" },
		"/w/dangling":       func(e entry) bool { return e.Linkname == "nowhere" },
		"/venv/bin/python3": func(e entry) bool { return e.Linkname == "/usr/bin/python3" },
		"/usr/sbin/cron":    func(e entry) bool { return e.Mode&0o111 != 0 },
	} {
		e, ok := fs[p]
		switch {
		case !ok:
			t.Errorf("%s is not in the image", p)
		case !is(e):
			t.Errorf("%s is %+v with %q", p, e.Header, e.Data)
		}
	}
	if a, h := fs["/w/a"], fs["/w/hard"]; a.Header == nil || h.Header == nil || (a.Typeflag != '1') == (h.Typeflag != '1') {
		t.Errorf("/w/a and /w/hard are not one file: %+v, %+v", a.Header, h.Header)
	}
	for _, p := range []string{"/etc/resolv.conf", "/etc/hostname", "/etc/hosts"} {
		if e, ok := fs[p]; ok && strings.Contains(e.Data, "buildkitsandbox") {
			t.Errorf("the builder's %s is in the image: %q", p, e.Data)
		}
	}
}

// TestToolchains runs npm ci and go build.
func TestToolchains(t *testing.T) {
	guard(t)
	t.Run("npm", func(t *testing.T) {
		bed := kilnrun.Open(t, "library/node:20")
		dir := files{
			"Dockerfile": `ARG REGISTRY
FROM ${REGISTRY}/library/node:20
WORKDIR /app
COPY . .
RUN npm ci --no-audit --no-fund
RUN node -e 'if (require("tiny")() !== 42) process.exit(9)' && ./node_modules/.bin/tiny && test "$(cat vendor/tiny/built)" = built
`,
			"package.json": `{"name":"app","version":"1.0.0","dependencies":{"tiny":"file:vendor/tiny"}}`,
			"package-lock.json": `{"name":"app","version":"1.0.0","lockfileVersion":3,"requires":true,"packages":{
"":{"name":"app","version":"1.0.0","dependencies":{"tiny":"file:vendor/tiny"}},
"node_modules/tiny":{"resolved":"vendor/tiny","link":true},
"vendor/tiny":{"version":"1.2.3","hasInstallScript":true,"bin":{"tiny":"cli.js"}}}}`,
			"vendor/tiny/package.json": `{"name":"tiny","version":"1.2.3","main":"index.js","bin":{"tiny":"cli.js"},"scripts":{"postinstall":"printf built > built"}}`,
			"vendor/tiny/index.js":     "module.exports = () => 42;\n",
			"vendor/tiny/cli.js":       "#!/usr/bin/env node\nconsole.log('tiny');\n",
		}.write(t, filepath.Join(bed.Dir, "context"))
		_, out := bed.Build(t, dir, "npm")
		noPanic(t, out)
	})
	t.Run("go", func(t *testing.T) {
		bed := kilnrun.Open(t, "library/golang:1.26-busybox")
		dir := files{
			"Dockerfile": `ARG REGISTRY
FROM ${REGISTRY}/library/golang:1.26-busybox AS build
WORKDIR /src
COPY . .
RUN CGO_ENABLED=0 go build -o /out/hello .
RUN test "$(/out/hello)" = "hello from linux"
FROM scratch
COPY --from=build /out/hello /hello
RUN ["/hello"]
ENTRYPOINT ["/hello"]
`,
			"go.mod":  "module hello\n\ngo 1.26\n",
			"main.go": "package main\n\nimport \"runtime\"\n\nfunc main() { print2(\"hello from \" + runtime.GOOS) }\n",
			"p.go":    "package main\n\nimport \"os\"\n\nfunc print2(s string) { os.Stdout.WriteString(s + \"\\n\") }\n",
		}.write(t, filepath.Join(bed.Dir, "context"))
		ref, out := bed.Build(t, dir, "go")
		if !strings.Contains(out, "hello from linux") {
			t.Errorf("the built program was not run:\n%s", out)
		}
		if fs := rootfs(t, ref); len(fs) > 5 { // with RUN's /dev, /etc, /proc and /sys
			t.Errorf("the image has %d files: %v", len(fs), slices.Sorted(maps.Keys(fs)))
		}
	})
}

// TestDaemonsEnd: a step ends with its command, whatever that leaves running.
func TestDaemonsEnd(t *testing.T) {
	guard(t)
	bed := kilnrun.Open(t, busybox)
	dir := files{"Dockerfile": `ARG REGISTRY
FROM ${REGISTRY}/library/busybox:latest
RUN sleep 10000 & setsid sleep 10000 & (trap '' TERM HUP; while :; do date > /tick; sleep 1; done) & echo left three
RUN httpd -p 127.0.0.1:0 -h / 2>/dev/null; nohup sleep 10000 > /dev/null 2>&1 & echo $! > /pid
RUN test -z "$(pgrep sleep)" && ps > /ps && echo alone
`}.write(t, filepath.Join(bed.Dir, "context"))
	ref, out := bed.Build(t, dir, "daemons", "--timeout", "4m")
	noPanic(t, out)
	if !strings.Contains(out, "left three") || !strings.Contains(out, "alone") {
		t.Errorf("steps are missing:\n%s", out)
	}
	if ps := rootfs(t, ref)["/ps"].Data; strings.Contains(ps, "10000") || strings.Contains(ps, "httpd") {
		t.Errorf("a daemon outlived its step:\n%s", ps)
	}
}

// failure is a build that must fail, and how.
type failure struct {
	name       string
	dockerfile string // REGISTRY is an argument
	args       []string
	code       int
	says       []string
	prepare    func(t *testing.T, bed *kilnrun.Bed)
	wrap       func(t *testing.T, cmd *exec.Cmd)
}

// TestStepsFail: whatever ends a step, the error names its line and the cause,
// no tag is pushed, and the next build in the same store works.
func TestStepsFail(t *testing.T) {
	guard(t)
	const head = "ARG REGISTRY\nFROM ${REGISTRY}/library/debian:bookworm\nRUN echo before > /before\n"
	const at = `(?m)^Dockerfile:4\n-+\n`
	for _, f := range []failure{
		{
			name: "code", dockerfile: head + "RUN echo said so; exit 3\n", code: diag.ExitStep,
			says: []string{at, `>>> RUN echo said so; exit 3`, `exit code: 3`},
		},
		{
			name: "signal", dockerfile: head + "RUN kill -SEGV $$\n", code: diag.ExitStep,
			says: []string{at, `>>> RUN kill -SEGV`, `signal 11|exit code: 139`},
		},
		{
			name: "missing", dockerfile: head + "RUN [\"/no/such/program\"]\n", code: diag.ExitStep,
			says: []string{at, `/no/such/program`, `hint: `},
		},
		{
			name: "timeout", dockerfile: head + "RUN echo looping; while :; do :; done\n", args: []string{"--timeout", "15s"}, code: diag.ExitTimeout,
			says: []string{at, `>>> RUN echo looping`, `(?m)^\d+\.\d+ looping\n------\nDockerfile:4`, `longer than --timeout 15s`},
		},
		{
			name: "disk-tmpfs", dockerfile: head + "RUN dd if=/dev/zero of=/big bs=1M\n", code: diag.ExitStep,
			says: []string{at, `>>> RUN dd`, `no space left on the builder's disk`, `hint: .*disk`}, prepare: smallTmpfs,
		},
		{
			name: "disk-ext4", dockerfile: head + "RUN cat /dev/urandom > /big\n", code: diag.ExitStep,
			says: []string{at, `>>> RUN cat`, `no space left on the builder's disk`, `hint: .*disk`}, prepare: smallExt4,
		},
		{
			name: "memory", dockerfile: head + "RUN tail /dev/zero\n", code: diag.ExitStep,
			says: []string{at, `>>> RUN tail`, `out of memory`, `hint: .*memory`}, wrap: littleMemory,
		},
		{
			name: "memory-files", dockerfile: head + "RUN dd if=/dev/zero of=/dev/shm/x bs=1M count=4000\n", code: diag.ExitStep,
			says: []string{at, `>>> RUN dd`, `out of memory|exit code: 1`}, wrap: littleMemory,
		},
	} {
		t.Run(f.name, func(t *testing.T) { f.test(t, head) })
	}
}

func (f failure) test(t *testing.T, head string) {
	if f.prepare != nil || f.wrap != nil {
		needRoot(t)
	}
	bed := kilnrun.Open(t, debian)
	if f.prepare != nil {
		f.prepare(t, bed)
	}
	dir := files{"Dockerfile": f.dockerfile}.write(t, filepath.Join(bed.Dir, "context"))
	ref := bed.Host + "/fails"
	args := append([]string{"build", "--progress", "plain", "--push", "--build-arg", "REGISTRY=" + bed.Host, "-t", ref}, f.args...)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := bed.Command(ctx, append(args, dir)...)
	if f.wrap != nil {
		f.wrap(t, cmd)
	}
	start := time.Now()
	b, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		t.Fatalf("run kiln: %v\n%s", err, b)
	}
	t.Logf("failed after %.1f s", time.Since(start).Seconds())
	noPanic(t, string(b))
	want(t, string(b), cmd.ProcessState.ExitCode(), f.code, f.says...)
	notPushed(t, ref)
	files{"Dockerfile": head + "RUN cat /before > /after\n"}.write(t, dir)
	ref, out := bed.Build(t, dir, "after")
	noPanic(t, out)
	if got := rootfs(t, ref)["/after"].Data; got != "before\n" {
		t.Errorf("the next build made %q", got)
	}
}

// smallTmpfs puts the store on a disk in memory with little room.
func smallTmpfs(t *testing.T, bed *kilnrun.Bed) {
	mount(t, bed, "-t", "tmpfs", "-o", fmt.Sprintf("size=400m,mode=0700,uid=%d,gid=%[1]d", kilnrun.Nobody), "tmpfs")
}

// smallExt4 puts the store on a real file system with little room.
func smallExt4(t *testing.T, bed *kilnrun.Bed) {
	image := filepath.Join(bed.Dir, "disk")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(400 << 20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-E", fmt.Sprintf("root_owner=%d:%[1]d", kilnrun.Nobody), image).CombinedOutput(); err != nil {
		t.Skipf("no mkfs.ext4 here: %v %s", err, out)
	}
	mount(t, bed, "-o", "loop", image)
}

func mount(t *testing.T, bed *kilnrun.Bed, args ...string) {
	t.Helper()
	if err := os.Mkdir(bed.Store(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(bed.Store(), kilnrun.Nobody, kilnrun.Nobody); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mount", append(args, bed.Store())...).CombinedOutput(); err != nil {
		t.Skipf("cannot mount here: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", bed.Store()).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
			_ = exec.Command("umount", "-l", bed.Store()).Run()
		}
	})
}

// littleMemory starts a command in a memory cgroup of its own, of whichever
// version the machine has.
func littleMemory(t *testing.T, cmd *exec.Cmd) {
	const limit = "300000000"
	base, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes" // version 1
	if _, err := os.Stat(base); err != nil {
		base, file = "/sys/fs/cgroup", "memory.max"
	}
	dir, err := os.MkdirTemp(base, "kiln-e2e-*")
	if err != nil {
		t.Skipf("cannot make a memory cgroup here: %v", err)
	}
	t.Cleanup(func() {
		for range 100 { // processes take a moment to go
			if err = os.Remove(dir); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("processes are left in the cgroup: %v", err)
	})
	if err := os.WriteFile(filepath.Join(dir, file), []byte(limit), 0o644); err != nil {
		t.Skipf("cannot limit memory here: %v", err)
	}
	script := `echo $$ > "$0/cgroup.procs" && exec "$@"`
	cmd.Args = append([]string{"sh", "-c", script, dir}, cmd.Args...)
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Path = sh
}

// TestImpliedDirectories: a base image's layer has files in directories that it has no entries for. RUN and
// COPY see the directories as the layer below has them, and so they are in the image.
func TestImpliedDirectories(t *testing.T) {
	guard(t)
	t.Parallel()
	bed := kilnrun.Open(t, busybox)
	base := bed.Host + "/implied:base"
	pushLayers(t, base,
		tarLayer(t, tarEntry{Name: "opt/", Type: '5', Mode: 0o2750}, tarEntry{Name: "opt/app/", Type: '5', Mode: 0o711}),
		tarLayer(t, tarEntry{Name: "opt/app/bin/tool", Body: "tool"}))
	dir := files{"Dockerfile": `ARG REGISTRY
FROM ${REGISTRY}/implied:base
RUN stat -c '%n %a' /opt /opt/app /opt/app/bin > /seen && touch /opt/app/new && chmod 700 /opt/app/bin
COPY Dockerfile /opt/app/copied
`}.write(t, filepath.Join(bed.Dir, "context"))
	ref, _ := bed.Build(t, dir, "implied:1")
	fs := rootfs(t, ref)
	if got, want := fs["/seen"].Data, "/opt 2750\n/opt/app 711\n/opt/app/bin 755\n"; got != want {
		t.Errorf("RUN saw %q, want %q", got, want)
	}
	for p, mode := range map[string]int64{"/opt": 0o2750, "/opt/app": 0o711, "/opt/app/bin": 0o700} {
		if e := fs[p]; e.Header == nil || e.Mode&0o7777 != mode {
			t.Errorf("%s is %+v, want mode %o", p, e.Header, mode)
		}
	}
}

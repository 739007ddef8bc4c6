package progress

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tmuxEnv makes the test program be the program that runs in tmux.
const tmuxEnv = "KILN_TEST_IN_TMUX"

func TestMain(m *testing.M) {
	if dir := os.Getenv(tmuxEnv); dir != "" {
		tmuxProgram(dir)
		return
	}
	os.Exit(m.Run())
}

// tmuxProgram shows a build that waits where the test wants to look.
func tmuxProgram(dir string) {
	d, err := Choose("tty", os.Stdout, false, os.Getenv)
	if err != nil {
		fmt.Println(err)
		return
	}
	r := NewRecorder(d)
	a, b := r.Step("[1/2] RUN echo 世界世界 👩‍👩‍👧", ""), r.Step("[2/2] RUN b", "")
	a.Start()
	b.Start()
	for i := range 20 {
		say(a, fmt.Sprintf("\x1b[31m世界 %d 世界世界世界世界世界世界世界世界世界世界世界世界 👩‍👩‍👧 👍🏽\r\n", i))
	}
	for _, name := range []string{"one", "two"} {
		for {
			if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		a.Done(nil)
	}
	b.Done(errors.New("exit code: 2"))
	_ = d.Close()
	fmt.Println("the end")
}

// What a real terminal shows, with characters about whose width programs
// disagree: as many lines as there should be, each in its place.
func TestTTYInTmux(t *testing.T) {
	tmux, err := exec.LookPath("tmux")
	if err != nil {
		t.Skip("tmux is not installed")
	}
	dir := t.TempDir()
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(tmux, append([]string{"-u", "-S", filepath.Join(dir, "sock"), "-f", "/dev/null"}, args...)...)
		cmd.Env = append(os.Environ(), tmuxEnv+"="+dir, "LC_ALL=C.UTF-8", "TERM=xterm-256color")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("tmux %s: %v\n%s", args[0], err, out)
		}
		return trimLines(string(out))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run("new-session", "-d", "-x", "40", "-y", "16", fmt.Sprintf("echo before; %q; exec sleep 60", self))
	defer run("kill-server")
	shows := func(want ...string) {
		t.Helper()
		var got string
		for range 200 {
			got = run("capture-pane", "-p")
			lines := strings.Split(got, "\n")
			ok := len(lines) >= len(want)
			for i := 0; ok && i < len(want); i++ {
				ok = strings.HasPrefix(lines[i], want[i])
			}
			if ok && len(lines) == len(want)+1 {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Fatalf("want lines that begin with\n%s\ngot\n%s", strings.Join(want, "\n"), got)
	}
	window := func(from int) (lines []string) {
		for i := from; i < 20; i++ {
			lines = append(lines, fmt.Sprintf(" => => # 世界 %d ", i))
		}
		return lines
	}
	shows(append([]string{"before", "[+] Building ", " => [1/2] RUN echo 世界世界 "}, append(window(14), " => [2/2] RUN b ")...)...)
	if err := os.WriteFile(filepath.Join(dir, "one"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	shows("before", "[+] Building ", " => [1/2] RUN echo 世界世界 ", " => [2/2] RUN b ")
	run("resize-window", "-x", "70", "-y", "10")
	if err := os.WriteFile(filepath.Join(dir, "two"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	shows("before", "[+] Building ", " => [1/2] RUN echo 世界世界 ", " => ERROR [2/2] RUN b ", "the end")
}

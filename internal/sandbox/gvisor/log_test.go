package gvisor

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestLogIsBounded(t *testing.T) {
	var l sentryLog
	for i := range 100000 {
		fmt.Fprintf(&l, "line %d\n", i)
	}
	if len(l.buf) > 2*logSize {
		t.Errorf("keeps %d bytes", len(l.buf))
	}
	if got := l.crash(); !strings.HasSuffix(got, "line 99999") {
		t.Errorf("ends in %q", got)
	}
}

func TestCrashBeginsWithThePanic(t *testing.T) {
	l := sentryLog{also: &bytes.Buffer{}}
	fmt.Fprintf(&l, "W1 some warning\n\npanic: runtime error: index out of range\n\ngoroutine 1 [running]:\nmain.f()\n%s", strings.Repeat("frame\n", 100))
	if got := l.crash(); !strings.HasPrefix(got, "panic: runtime") || strings.Count(got, "\n") > 15 {
		t.Errorf("got %q", got)
	}
}

func TestOOMFiles(t *testing.T) {
	got := oomFiles("12:cpu:/x\n5:memory:/docker/abc\n0::/user.slice/../s\n")
	for _, want := range []string{
		"/sys/fs/cgroup/memory/docker/abc/memory.oom_control", "/sys/fs/cgroup/s/memory.events", "/sys/fs/cgroup/memory.events",
	} {
		if !slices.Contains(got, want) {
			t.Errorf("%v has no %s", got, want)
		}
	}
}

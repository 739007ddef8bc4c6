package gvisor

import (
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
)

// oomKills is how many processes of this control group the kernel has killed
// for memory so far. ok is false if that cannot be found out.
func oomKills() (n uint64, ok bool) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return 0, false
	}
	for _, f := range oomFiles(string(own)) {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range lines(string(b)) {
			if v, found := strings.CutPrefix(line, "oom_kill "); found {
				n, err := strconv.ParseUint(v, 10, 64)
				return n, err == nil
			}
		}
	}
	return 0, false
}

// oomFiles are the files that may have the count, for a process with the given
// /proc/self/cgroup. A container usually sees its own group as the root.
func oomFiles(own string) []string {
	var v1, v2 string
	for line := range lines(own) {
		parts := strings.SplitN(line, ":", 3)
		switch {
		case len(parts) != 3:
		case parts[1] == "":
			v2 = parts[2]
		case strings.Contains(","+parts[1]+",", ",memory,"):
			v1 = parts[2]
		}
	}
	const root = "/sys/fs/cgroup"
	return []string{
		path.Join(root, "memory", path.Clean("/"+v1), "memory.oom_control"),
		path.Join(root, "memory", "memory.oom_control"),
		path.Join(root, path.Clean("/"+v2), "memory.events"),
		path.Join(root, "memory.events"),
	}
}

// oomDetail tells the user what is known about a sentry that was killed.
func oomDetail(before uint64, counted bool) string {
	if after, ok := oomKills(); ok && counted && after > before {
		return fmt.Sprintf("the kernel's out-of-memory killer ended the step (%d kills in this control group): give the builder more memory", after-before)
	}
	return "the step was ended by SIGKILL, probably by the kernel for lack of memory"
}

package console

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/store"
	"golang.org/x/sys/unix"
)

// systemStore is the store of a process without a home directory.
const systemStore = "/var/lib/kiln"

// StoreRoot is where the store is: the flag, $KILN_ROOT, $XDG_DATA_HOME/kiln,
// $HOME/.local/share/kiln, or, without a home as in many pods, /var/lib/kiln if
// that can be written, else a directory of the user's own in the temporary one.
func StoreRoot(flag string, getenv func(string) string) (string, error) {
	for _, dir := range []string{flag, getenv("KILN_ROOT")} {
		if dir != "" {
			return filepath.Abs(dir)
		}
	}
	// A relative XDG_DATA_HOME is to be ignored, as its specification says.
	if dir := getenv("XDG_DATA_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kiln"), nil
	}
	// Container runtimes set HOME=/ for users that /etc/passwd does not know.
	if home := getenv("HOME"); filepath.IsAbs(home) && filepath.Clean(home) != "/" {
		return filepath.Join(home, ".local", "share", "kiln"), nil
	}
	if err := os.MkdirAll(systemStore, 0o700); err == nil && unix.Access(systemStore, unix.W_OK) == nil {
		return systemStore, nil
	}
	return privateTemp(os.TempDir(), os.Geteuid())
}

// privateTemp makes sure that there is a directory for uid in tmp, where others
// may have planted something under its name.
func privateTemp(tmp string, uid int) (string, error) {
	dir := filepath.Join(tmp, fmt.Sprintf("kiln-%d", uid))
	fail := func(why string) error {
		return diag.New(diag.ExitFailure, "use directory %q as the store: %s", dir, why).
			WithHint("Name a directory of your own with --root or KILN_ROOT.")
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !os.IsExist(err) {
		return "", fail(err.Error())
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return "", fail(err.Error())
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.IsDir():
		return "", fail("it is not a directory")
	case !ok || int(st.Uid) != uid:
		return "", fail("it belongs to another user")
	case fi.Mode().Perm()&0o077 != 0:
		return "", fail("others may use it: its mode is " + fi.Mode().Perm().String())
	}
	return dir, nil
}

// BelowRoot is where the store is in the directory that buildkitd has for its state: a directory
// of its own if there are other things in it.
func BelowRoot(root string) string {
	es, err := os.ReadDir(root)
	if root == "" || err != nil || len(es) == 0 || slices.ContainsFunc(es, func(e fs.DirEntry) bool { return e.Name() == store.VersionFile }) {
		return root
	}
	return filepath.Join(root, "kiln")
}

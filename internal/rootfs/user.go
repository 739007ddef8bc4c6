package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/moby/sys/user"
)

// maxUserFile bounds how much of /etc/passwd and /etc/group is read, as
// BuildKit does.
const maxUserFile = 10 << 20

// User is whom a process runs as, all in numbers.
type User struct {
	UID, GID uint32
	// Groups are the supplementary groups; GID is always among them.
	Groups []uint32
	// Home is the home directory of UID; "/" if the image knows none.
	Home string
}

// LookupUser finds out whom a Dockerfile's USER means in the image t: "", "name",
// "uid", "name:group", "uid:gid" and mixtures. It decides as BuildKit does: both
// numbers given need no passwd and have no other groups, a number without an entry
// stands for itself with group 0, a name without one is an error, "" is root.
func LookupUser(t tree.Tree, spec string) (User, error) {
	u, err := lookupExecUser(t, spec)
	if err != nil {
		return User{}, err
	}
	if !slices.Contains(u.Groups, u.GID) {
		u.Groups = append([]uint32{u.GID}, u.Groups...)
	}
	if u.Home, err = home(t, u.UID); err != nil {
		return User{}, err
	}
	return u, nil
}

func lookupExecUser(t tree.Tree, spec string) (User, error) {
	isDefault := spec == ""
	if isDefault {
		spec = "0"
	}
	if uid, gid, ok := parseUIDGID(spec); ok {
		return User{UID: uid, GID: gid}, nil
	}
	// A file that cannot be opened is as good as none.
	var passwd, group io.Reader
	if r, err := openUserFile(t, "etc/passwd"); err == nil {
		defer r.Close()
		passwd = r
	}
	if r, err := openUserFile(t, "etc/group"); err == nil {
		defer r.Close()
		group = r
	}
	eu, err := user.GetExecUser(spec, nil, passwd, group)
	if err != nil {
		if isDefault {
			return User{}, nil
		}
		return User{}, err
	}
	u := User{}
	if u.UID, err = id32(eu.Uid); err != nil {
		return User{}, err
	}
	if u.GID, err = id32(eu.Gid); err != nil {
		return User{}, err
	}
	for _, g := range eu.Sgids {
		n, err := id32(g)
		if err != nil {
			return User{}, err
		}
		u.Groups = append(u.Groups, n)
	}
	return u, nil
}

// home is what an OCI runtime sets HOME to when the image does not.
func home(t tree.Tree, uid uint32) (string, error) {
	us, err := passwdEntries(t, func(e user.User) bool { return e.Uid >= 0 && uint32(e.Uid) == uid })
	if err != nil || len(us) == 0 || us[0].Home == "" {
		return "/", nil //nolint:nilerr // a broken passwd is no reason to fail what needs no name
	}
	return us[0].Home, nil
}

func parseUIDGID(spec string) (uid, gid uint32, ok bool) {
	us, gs, ok := strings.Cut(spec, ":")
	if !ok {
		return 0, 0, false
	}
	uid, uerr := parseID(us)
	gid, gerr := parseID(gs)
	return uid, gid, uerr == nil && gerr == nil
}

// parseID parses a user or group given by number; "root" is 0, as BuildKit has it.
func parseID(s string) (uint32, error) {
	if s == "root" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("parse id %q: %w", s, err)
	}
	return uint32(n), nil
}

// UserByName looks a user up in t's /etc/passwd, by name alone, even if that
// is a number. Without an entry, or without the file, found is false.
func UserByName(t tree.Tree, name string) (uid, gid uint32, found bool, err error) {
	us, err := passwdEntries(t, func(e user.User) bool { return e.Name == name })
	if err != nil || len(us) == 0 {
		return 0, 0, false, err
	}
	if uid, err = id32(us[0].Uid); err != nil {
		return 0, 0, false, fmt.Errorf("look up user %q: %w", name, err)
	}
	if gid, err = id32(us[0].Gid); err != nil {
		return 0, 0, false, fmt.Errorf("look up user %q: %w", name, err)
	}
	return uid, gid, true, nil
}

// GroupByName is UserByName for t's /etc/group.
func GroupByName(t tree.Tree, name string) (gid uint32, found bool, err error) {
	r, err := openUserFile(t, "etc/group")
	if err != nil {
		return 0, false, ignoreMissing(err)
	}
	defer r.Close()
	gs, err := user.ParseGroupFilter(r, func(g user.Group) bool { return g.Name == name })
	if err != nil || len(gs) == 0 {
		return 0, false, err
	}
	if gid, err = id32(gs[0].Gid); err != nil {
		return 0, false, fmt.Errorf("look up group %q: %w", name, err)
	}
	return gid, true, nil
}

// passwdEntries returns no entries if the image has no passwd.
func passwdEntries(t tree.Tree, want func(user.User) bool) ([]user.User, error) {
	r, err := openUserFile(t, "etc/passwd")
	if err != nil {
		return nil, ignoreMissing(err)
	}
	defer r.Close()
	first := true
	return user.ParsePasswdFilter(r, func(e user.User) bool {
		ok := first && want(e) // the first match wins: keep no others
		first = first && !ok
		return ok
	})
}

func id32(n int) (uint32, error) {
	if n < 0 || int64(n) > math.MaxUint32 {
		return 0, user.ErrRange
	}
	return uint32(n), nil
}

// errNotRegular: a device or pipe in place of passwd is never opened.
var errNotRegular = errors.New("not a regular file")

func openUserFile(t tree.Tree, p string) (io.ReadCloser, error) {
	if t == nil {
		return nil, &fs.PathError{Op: "open", Path: "/" + p, Err: fs.ErrNotExist}
	}
	real, err := Resolve(t, p, true)
	if err != nil {
		return nil, err
	}
	n, err := t.Lstat(real)
	if err != nil {
		return nil, err
	}
	if !n.IsRegular() {
		return nil, &fs.PathError{Op: "open", Path: "/" + p, Err: errNotRegular}
	}
	r, err := t.Open(real)
	if err != nil {
		return nil, err
	}
	return &limited{ReadCloser: r, left: maxUserFile, name: "/" + p}, nil
}

// ignoreMissing drops the errors that mean that an image has no such file.
func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	return err
}

// limited fails, rather than ends, after left bytes.
type limited struct {
	io.ReadCloser
	left int
	name string
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p[:min(len(p), l.left+1)])
	if l.left -= n; l.left < 0 {
		l.left = 0
		return 0, fmt.Errorf("%q exceeds %d bytes", l.name, maxUserFile)
	}
	return n, err
}

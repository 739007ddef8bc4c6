package rootfs

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kiln-build/kiln/internal/tree"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\n\nbin:x:1:1::/bin:\napp:x:1000:1001:App:/home/app:/bin/sh\nbroken\napp:x:5:5::/second:\n" +
		"nohome:x:7:8:::\n1234:x:9:9::/nine:\nhuge:x:99999999999:0::/:\nneg:x:-1:-1::/:\n"
	group = "root:x:0:\n# comment:x:66:app\nbin:x:1:root,bin\nstaff:x:50:app,root\napp:x:1001:\nwheel:x:10:app\nneg:x:-5:\n"
)

func image() *memtree.Tree {
	return memtree.New(map[string]memtree.File{
		"etc/passwd": memtree.Symlink("/usr/share/passwd"), "usr/share/passwd": {Data: passwd}, "etc/group": {Data: group},
	})
}

func TestLookupUser(t *testing.T) {
	full, empty := image(), memtree.New(nil)
	for _, c := range []struct {
		in   tree.Tree
		spec string
		want string
	}{
		{full, "", "0:0 [0 1 50] /root"},
		{full, "root", "0:0 [0 1 50] /root"},
		{full, "0", "0:0 [0 1 50] /root"},
		{full, "root:root", "0:0 [0] /root"},
		{full, "app", "1000:1001 [1001 50 10] /home/app"},
		{full, "1000", "1000:1001 [1001 50 10] /home/app"},
		{full, "app:staff", "1000:50 [50] /home/app"},
		{full, "app:77", "1000:77 [77] /home/app"},
		{full, "1000:1000", "1000:1000 [1000] /home/app"},
		{full, "4242", "4242:0 [0] /"},
		{full, "4242:staff", "4242:50 [50] /"},
		{full, "4294967295:1", "4294967295:1 [1] /"},
		{full, "nohome", "7:8 [8] /"},
		{full, "1234", "1234:0 [0] /"},
		{full, "nobody", "unable to find user nobody: no matching entries in passwd file"},
		{full, "app:nogroup", "unable to find group nogroup: no matching entries in group file"},
		{full, "2147483648", "uids and gids must be in range 0-2147483647"},
		{full, "neg", "uids and gids must be in range 0-2147483647"},
		{empty, "", "0:0 [0] /"},
		{empty, "0", "0:0 [0] /"},
		{empty, "5:6", "5:6 [6] /"},
		{empty, "5", "5:0 [0] /"},
		{empty, "app", "unable to find user app: no matching entries in passwd file"},
		{empty, "root:app", "unable to find user root: no matching entries in passwd file"},
		{empty, "5:app", "unable to find group app: no matching entries in group file"},
	} {
		u, err := LookupUser(c.in, c.spec)
		got := fmt.Sprintf("%d:%d %d %s", u.UID, u.GID, u.Groups, u.Home)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("LookupUser(%q) = %s, want %s", c.spec, got, c.want)
		}
	}
}

func TestByName(t *testing.T) {
	full, empty := image(), memtree.New(nil)
	for _, c := range []struct {
		in          tree.Tree
		user, group string
		want        string
	}{
		{full, "app", "staff", "1000:1001 true, 50 true"},
		{full, "root", "root", "0:0 true, 0 true"},
		{full, "1234", "0", "9:9 true, 0 false"}, // names, though they look like numbers
		{full, "nobody", "nogroup", "0:0 false, 0 false"},
		{empty, "app", "staff", "0:0 false, 0 false"},
		{nil, "app", "staff", "0:0 false, 0 false"},
	} {
		uid, gid, known, err := UserByName(c.in, c.user)
		if err != nil {
			t.Errorf("user %q: %v", c.user, err)
		}
		g, knownGroup, err := GroupByName(c.in, c.group)
		if err != nil {
			t.Errorf("group %q: %v", c.group, err)
		}
		if got := fmt.Sprintf("%d:%d %t, %d %t", uid, gid, known, g, knownGroup); got != c.want {
			t.Errorf("%q and %q are %s, want %s", c.user, c.group, got, c.want)
		}
	}
	if _, _, _, err := UserByName(full, "neg"); err == nil {
		t.Error("a user with a negative uid is taken")
	}
	if _, _, err := GroupByName(full, "neg"); err == nil {
		t.Error("a group with a negative gid is taken")
	}
}

// TestHostileUserFiles: devices are not opened, files not read without end.
func TestHostileUserFiles(t *testing.T) {
	for name, f := range map[string]memtree.File{
		"device":     {Mode: tree.ModeChar | 0o666, Major: 1, Minor: 5},
		"pipe":       {Mode: tree.ModeFIFO | 0o666},
		"directory":  memtree.Dir(0o755),
		"loop":       memtree.Symlink("passwd"),
		"outside":    memtree.Symlink("../../../../../../etc/shadow"),
		"long line":  {Data: strings.Repeat("x", 1<<20)},
		"many lines": {Data: strings.Repeat("x:x:1:1::/:\n", maxUserFile/12+10)},
	} {
		m := memtree.New(map[string]memtree.File{"etc/passwd": f})
		if u, err := LookupUser(m, "app"); err == nil {
			t.Errorf("%s: got %+v", name, u)
		}
		if u, err := LookupUser(m, ""); err != nil || u.UID != 0 || !slices.Equal(u.Groups, []uint32{0}) {
			t.Errorf("%s: the default user is %+v, %v", name, u, err)
		}
	}
}

func FuzzUsers(f *testing.F) {
	f.Add(passwd, group, "app:staff")
	f.Add("a:b:c", ":::", "0")
	f.Fuzz(func(t *testing.T, p, g, spec string) {
		m := memtree.New(map[string]memtree.File{"etc/passwd": {Data: p}, "etc/group": {Data: g}})
		if u, err := LookupUser(m, spec); err == nil && !slices.Contains(u.Groups, u.GID) {
			t.Errorf("%q gave %+v", spec, u)
		}
		user, group, _ := strings.Cut(spec, ":")
		_, _, _, _ = UserByName(m, user)
		_, _, _ = GroupByName(m, group)
	})
}

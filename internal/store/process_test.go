package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kiln-build/kiln/internal/diag"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// The test binary, run again, is the other processes.
func TestMain(m *testing.M) {
	role := os.Getenv("KILN_STORE_ROLE")
	if role == "" {
		os.Exit(m.Run())
	}
	if err := play(role, os.Getenv("KILN_STORE_ROOT")); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func play(role, root string) error {
	s, err := Open(root)
	if err != nil {
		return err
	}
	switch role {
	case "open":
		return nil
	case "count":
		return playCount(s)
	case "write":
		return playWrite(s)
	case "hold":
		return playHold(s)
	case "lose-lock":
		_, err := s.Lock(context.Background(), "held")
		fmt.Println("locked")
		time.Sleep(time.Minute)
		return err
	}
	return errors.New("unknown role")
}

// playCount adds 1 to a counter under the lock, many times.
func playCount(s *Store) error {
	p := filepath.Join(s.Root(), "..", "counter")
	for range 100 {
		unlock, err := s.Lock(context.Background(), "counter")
		if err != nil {
			return err
		}
		b, _ := os.ReadFile(p)
		n, _ := strconv.Atoi(string(b))
		if err := os.WriteFile(p, []byte(strconv.Itoa(n+1)), 0o600); err != nil {
			return err
		}
		unlock()
	}
	return nil
}

// playWrite does everything that writes, for ever.
func playWrite(s *Store) error {
	release, err := s.Use(context.Background())
	if err != nil {
		return err
	}
	defer release()
	fmt.Println("writing")
	for i := 0; ; i++ {
		// Few enough that processes write the same ones.
		content := strings.Repeat(strconv.Itoa(i%50)+" ", 50_000)
		d := digest.FromString(content)
		w, err := s.NewBlob()
		if err != nil {
			return err
		}
		for part := content; part != ""; part = part[min(len(part), 4096):] {
			if _, err := io.WriteString(w, part[:min(len(part), 4096)]); err != nil {
				return err
			}
		}
		if _, err := w.Commit(d); err != nil {
			return err
		}
		w.Close()
		l, err := s.NewLayer()
		if err != nil {
			return err
		}
		if _, err := l.File().WriteString(content); err != nil {
			return err
		}
		if err := l.Commit(d); err != nil {
			return err
		}
		l.Close()
		if err := s.PutRecord("k", strconv.Itoa(i%50), []byte(content)); err != nil {
			return err
		}
		if err := s.SetTag("t"+strconv.Itoa(i%50), ocispec.Descriptor{Digest: d, Size: int64(len(content))}); err != nil {
			return err
		}
		dir, cleanup, err := s.TempDir("x")
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, "f"), []byte(content), 0o600); err != nil {
			return err
		}
		cleanup()
		unlock, err := s.Lock(context.Background(), "name")
		if err != nil {
			return err
		}
		unlock()
	}
}

// playHold is a build that goes on: it uses what it is told on its input,
// and says whether that is there.
func playHold(s *Store) error {
	release, err := s.Use(context.Background())
	if err != nil {
		return err
	}
	defer release()
	fmt.Println("holding")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		_, err := s.StatBlob(digest.Digest(in.Text()))
		fmt.Println(err == nil)
	}
	return nil
}

type process struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func start(t *testing.T, role, root string, change ...func(*exec.Cmd)) *process {
	t.Helper()
	c := exec.Command(must(os.Executable())(t))
	c.Env = append(os.Environ(), "KILN_STORE_ROLE="+role, "KILN_STORE_ROOT="+root)
	c.Stderr = os.Stderr
	for _, f := range change {
		f(c)
	}
	p := &process{Cmd: c, in: must(c.StdinPipe())(t)}
	p.out = bufio.NewScanner(must(c.StdoutPipe())(t))
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		_ = p.Wait()
	})
	return p
}

func (p *process) line(t *testing.T) string {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("process ended: %v", p.out.Err())
	}
	return p.out.Text()
}

func (p *process) kill() {
	p.Process.Kill()
	_ = p.Wait()
}

func TestLockAcrossProcesses(t *testing.T) {
	s := open(t)
	var ps []*process
	for range 4 {
		ps = append(ps, start(t, "count", s.Root()))
	}
	if err := playCount(s); err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		for p.out.Scan() {
			t.Error(p.out.Text())
		}
		if err := p.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	if b := must(os.ReadFile(filepath.Join(s.Root(), "..", "counter")))(t); string(b) != "500" {
		t.Fatalf("counter is %s, want 500", b)
	}
	if es := must(os.ReadDir(s.path(dirLocks)))(t); len(es) != 1 {
		t.Errorf("%d files in locks, want the gate alone", len(es))
	}
}

func TestLockEndsWithItsProcess(t *testing.T) {
	s := open(t)
	p := start(t, "lose-lock", s.Root())
	p.line(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, "held"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("locking what another process holds gave %v", err)
	}
	p.kill()
	ctx, cancel = context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	unlock, err := s.Lock(ctx, "held")
	if err != nil {
		t.Fatal(err)
	}
	// Another goroutine waits too, and obeys its context.
	short, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(short, "held"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("locking twice gave %v", err)
	}
	unlock()
	if len(s.local) != 0 {
		t.Errorf("%d names remembered after the last lock", len(s.local))
	}
}

// A store is whole after any number of processes were killed in it.
func TestKilledWriters(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	root := filepath.Join(t.TempDir(), "store")
	for i := range rounds {
		ps := []*process{start(t, "write", root), start(t, "write", root)}
		for _, p := range ps {
			if i%5 != 4 { // also in the middle of Open
				if got := p.line(t); got != "writing" {
					t.Fatal(got)
				}
			}
		}
		time.Sleep(time.Duration(rand.IntN(60_000)) * time.Microsecond)
		for _, p := range ps {
			p.kill()
		}
		checkWhole(t, root)
	}
}

func checkWhole(t *testing.T, root string) {
	t.Helper()
	s := must(Open(root))(t)
	s.awaitSyncs(time.Minute)
	for _, dir := range []string{dirBlobs, dirLayers} {
		if err := eachFile(s.path(dir), func(p string, _ fs.FileInfo) error {
			if d := digest.FromBytes(must(os.ReadFile(p))(t)); d.Encoded() != filepath.Base(p) {
				t.Fatalf("%s has another content", p)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{dirRecords, dirTags} {
		if err := eachFile(s.path(dir), func(p string, _ fs.FileInfo) error {
			_, _, err := readRecord(p)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tag := range must(s.Tags())(t) {
		if !s.HasLayer(tag.Descriptor.Digest) {
			t.Errorf("tag %s lacks its layer", tag.Ref)
		}
		if _, err := s.ReadBlob(tag.Descriptor.Digest, 1<<20); err != nil {
			t.Error(err)
		}
	}
	if names := tmpNames(t, s); len(names) > 0 {
		t.Errorf("left in tmp after the sweep: %q", names)
	}
	rep := must(s.Prune(context.Background(), PruneOptions{Limit: Limit{MaxUsed: 1 << 40}}))(t)
	if rep.InUse != 0 {
		t.Errorf("dead processes keep %d bytes", rep.InUse)
	}
	for _, tag := range must(s.Tags())(t) {
		if !s.HasLayer(tag.Descriptor.Digest) {
			t.Errorf("prune took the layer of tag %s", tag.Ref)
		}
	}
	if es := must(os.ReadDir(s.path(dirUses)))(t); len(es) > 0 {
		t.Errorf("%d uses left by dead processes", len(es))
	}
}

// Writers and a pruner at the same time: nobody sees an error, and no build
// loses what it has just put.
func TestPruneAmongWriters(t *testing.T) {
	s := open(t)
	ps := []*process{start(t, "write", s.Root()), start(t, "write", s.Root())}
	for _, p := range ps {
		p.line(t)
	}
	release := must(s.Use(context.Background()))(t)
	for end, i := time.Now().Add(time.Second), 0; time.Now().Before(end); i++ {
		content := []byte("content " + strconv.Itoa(i))
		d := must(s.PutBlob(content))(t)
		must(must(Open(s.Root()))(t).Prune(context.Background(), PruneOptions{}))(t)
		if b := must(s.ReadBlob(d, 100))(t); string(b) != string(content) {
			t.Fatalf("content %q", b)
		}
	}
	for _, p := range ps {
		if err := p.Process.Signal(syscall.Signal(0)); err != nil {
			t.Fatal("a writer has ended")
		}
		p.kill()
		for p.out.Scan() {
			t.Error(p.out.Text())
		}
	}
	release()
	checkWhole(t, s.Root())
}

func TestPruneSparesARunningBuild(t *testing.T) {
	s := open(t)
	old := must(s.PutBlob([]byte("old")))(t)
	unused := must(s.PutBlob([]byte("unused")))(t)
	past := time.Now().Add(-48 * time.Hour)
	for _, d := range []digest.Digest{old, unused} {
		if err := os.Chtimes(must(s.blobPath(d))(t), past, past); err != nil {
			t.Fatal(err)
		}
	}
	p := start(t, "hold", s.Root())
	p.line(t)
	fmt.Fprintln(p.in, old)
	if p.line(t) != "true" {
		t.Fatal("the build does not find its blob")
	}
	rep := must(s.Prune(context.Background(), PruneOptions{DryRun: true}))(t)
	if rep.Blobs != 1 || rep.Bytes == 0 || rep.InUse == 0 {
		t.Fatalf("dry run: %+v", rep)
	}
	must(s.StatBlob(unused))(t)
	os.Chtimes(must(s.blobPath(unused))(t), past, past)
	if rep = must(s.Prune(context.Background(), PruneOptions{}))(t); rep.Blobs != 1 {
		t.Fatalf("prune: %+v", rep)
	}
	_, err := s.StatBlob(unused)
	wantMissing(t, err)
	fmt.Fprintln(p.in, old)
	if p.line(t) != "true" {
		t.Fatal("prune took what a running build uses")
	}
	p.kill()
	if rep = must(s.Prune(context.Background(), PruneOptions{}))(t); rep.Blobs != 1 {
		t.Fatalf("prune after the build has died: %+v", rep)
	}
}

func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a small tmpfs takes root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := must(Open(filepath.Join(dir, "store")))(t)
	w := must(s.NewBlob())(t)
	_, err := io.Copy(w, io.LimitReader(neverEnding('x'), 4<<20))
	var d *diag.Error
	if !errors.As(err, &d) || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(d.Hint, "prune") {
		t.Fatalf("writing to a full disk gave %v", err)
	}
	if err := s.PutRecord("k", "k", make([]byte, 1<<16)); !errors.As(err, &d) {
		t.Fatalf("a record on a full disk gave %v", err)
	}
	w.Close()
	if names := tmpNames(t, s); len(names) > 0 {
		t.Fatalf("left in tmp: %q", names)
	}
	must(s.PutBlob([]byte("there is room again")))(t)
	s.awaitSyncs(time.Minute)
}

type neverEnding byte

func (b neverEnding) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(b)
	}
	return len(p), nil
}

// asUser runs the process as another user, with no groups and no capability.
func asUser(uid uint32) func(*exec.Cmd) {
	return func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	}
}

func TestUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("running as another user takes root")
	}
	// Not t.TempDir: the other user must get through the folders above,
	// and run the test binary.
	base := must(os.MkdirTemp("/tmp", "kiln-store-"))(t)
	t.Cleanup(func() { os.RemoveAll(base) })
	os.Chmod(base, 0o777)
	bin := filepath.Join(base, "test")
	if err := os.WriteFile(bin, must(os.ReadFile(must(os.Executable())(t)))(t), 0o755); err != nil {
		t.Fatal(err)
	}
	as := func(uid uint32, root string) string {
		t.Helper()
		p := start(t, "open", root, asUser(uid), func(c *exec.Cmd) { c.Path, c.Dir = bin, base })
		defer p.kill()
		if p.out.Scan() {
			return p.out.Text()
		}
		return ""
	}
	mine := must(Open(filepath.Join(base, "roots")))(t).Root()
	if out := as(65532, mine); !strings.Contains(out, "permission denied") {
		t.Errorf("opening root's store as 65532: %q", out)
	}
	theirs := filepath.Join(base, "theirs")
	if out := as(65532, theirs); out != "" {
		t.Fatalf("65532 cannot make a store: %s", out)
	}
	if _, err := Open(theirs); err == nil || !strings.Contains(err.Error(), "belongs to user id 65532") {
		t.Errorf("root opens another's store: %v", err)
	}
	if out := as(65532, theirs); out != "" {
		t.Errorf("65532 cannot open the store again: %s", out)
	}
	// A volume as Kubernetes makes it: everybody's, and not ours.
	vol := filepath.Join(base, "vol")
	os.Mkdir(vol, 0o777)
	os.Chmod(vol, 0o777)
	if out := as(65532, vol); out != "" {
		t.Errorf("65532 cannot use a volume: %s", out)
	}
	readOnly := filepath.Join(base, "ro")
	os.Mkdir(readOnly, 0o555)
	if out := as(65532, filepath.Join(readOnly, "store")); !strings.Contains(out, "permission denied") {
		t.Errorf("making a store where that is not allowed: %q", out)
	}
}

func TestReadOnlyDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting takes root")
	}
	s := open(t)
	root := s.Root()
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(root, unix.MNT_DETACH) })
	if err := unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Skipf("remount: %v", err)
	}
	_, err := Open(root)
	var d *diag.Error
	if !errors.As(err, &d) || !errors.Is(err, syscall.EROFS) || !strings.Contains(d.Hint, "--root") {
		t.Fatalf("opening a store on a read-only disk gave %v", err)
	}
}

// Two processes that make the same store at once both get it.
func TestOpenAtOnce(t *testing.T) {
	for i := range 20 {
		root := filepath.Join(t.TempDir(), strconv.Itoa(i))
		var ps []*process
		for range 3 {
			ps = append(ps, start(t, "open", root))
		}
		for _, p := range ps {
			for p.out.Scan() {
				t.Error(p.out.Text())
			}
			if err := p.Wait(); err != nil {
				t.Error(err)
			}
		}
	}
}

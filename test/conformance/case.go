// Package conformance holds Dockerfiles with an expected outcome: either the
// image that BuildKit makes of them, compared with package compare, or an error
// of a given text. Each is one txtar file in cases/: a header of "key: value"
// lines, then the files of the build context. Its test builds all of them with
// Kiln, without any privilege where it can take it away.
package conformance

import (
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/kiln-build/kiln/test/compare"
	"github.com/kiln-build/kiln/test/kilnrun"
)

//go:embed cases/*.txtar
var casesFS embed.FS

// Case is one Dockerfile with its context. The header's keys, each repeatable
// where it makes sense:
//
//	# text           what the case is about
//	file: NAME       the Dockerfile's name in the context (Dockerfile)
//	target: STAGE    stage to build
//	arg: NAME=VALUE  build argument; REGISTRY is given to every case
//	label: K=V       label given on the command line
//	platform: P      --platform
//	network: MODE    --network (Kiln) and force-network-mode (BuildKit)
//	add-host: H=IP   --add-host
//	context: N=REF   a named context; $REGISTRY in it is replaced
//	pre: FILE        a Dockerfile to build and push first; its image is build argument BASE
//	serve: DIR       a directory of the context that an http server has at build argument WEB
//	error: REGEXP    the build must fail with output that matches
//	code: N          and Kiln with this exit code
//	kiln-only: WHY   BuildKit is not asked; only for errors
//	ignore: PATTERN  paths that are not compared
//	mtime: PATTERN   paths whose modification times are compared
//	differs: PATTERN a difference that docs/compatibility.md explains, as path.Match over its place
//	buildah: WHY     buildah is known to make something else of it, or nothing
//
// A file setup.sh in it is run in the context by an ordinary user, to make what
// txtar cannot hold, and then removed. Everything it does not touch is of one
// time, which is long past.
type Case struct {
	Name     string
	File     string
	Target   string
	Args     []string
	Labels   []string
	Platform string
	Network  string
	Hosts    []string
	Contexts []string
	Pre      string
	Serve    string
	Error    *regexp.Regexp
	Code     int
	KilnOnly string
	Compare  compare.Options
	Differs  []string
	Buildah  string

	// question is the case as it is put to a reference: all but what its header says of buildah.
	question string
	files    []txtar.File
}

// Load reads all cases, sorted by name.
func Load() ([]*Case, error) {
	names, err := fs.Glob(casesFS, "cases/*.txtar")
	if err != nil {
		return nil, err
	}
	var all []*Case
	for _, n := range names {
		data, err := casesFS.ReadFile(n)
		if err != nil {
			return nil, err
		}
		c, err := parse(strings.TrimSuffix(path.Base(n), ".txtar"), data)
		if err != nil {
			return nil, fmt.Errorf("read case %s: %w", n, err)
		}
		all = append(all, c)
	}
	return all, nil
}

func parse(name string, data []byte) (*Case, error) {
	a := txtar.Parse(data)
	c := &Case{Name: name, files: a.Files}
	c.Compare.Layers = true
	for line := range strings.Lines(string(a.Comment)) {
		if !strings.HasPrefix(line, "buildah:") {
			c.question += line
		}
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		k, v, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("header line %q is not KEY: VALUE", line)
		}
		if err := c.set(k, strings.TrimSpace(v)); err != nil {
			return nil, err
		}
	}
	if c.Serve != "" {
		c.Args = append(c.Args, "WEB="+c.webURL())
	}
	c.question += string(data[len(a.Comment):])
	if c.KilnOnly != "" && c.Error == nil {
		return nil, errors.New("kiln-only without error: nothing would be tested")
	}
	return c, nil
}

func (c *Case) set(k, v string) (err error) {
	lists := map[string]*[]string{
		"arg": &c.Args, "label": &c.Labels, "add-host": &c.Hosts, "context": &c.Contexts,
		"ignore": &c.Compare.Ignore, "mtime": &c.Compare.Mtime, "differs": &c.Differs,
	}
	words := map[string]*string{
		"file": &c.File, "target": &c.Target, "platform": &c.Platform, "network": &c.Network, "pre": &c.Pre, "serve": &c.Serve, "kiln-only": &c.KilnOnly,
		"buildah": &c.Buildah,
	}
	switch {
	case lists[k] != nil:
		*lists[k] = append(*lists[k], v)
	case words[k] != nil:
		*words[k] = v
	case k == "error":
		c.Error, err = regexp.Compile(v)
	case k == "code":
		c.Code, err = strconv.Atoi(v)
	default:
		err = fmt.Errorf("header key %q is not known", k)
	}
	return err
}

// key names a reference's answer: it depends on the case and what it is built from.
func (c *Case) key(salt string) string {
	h := sha256.New()
	for _, s := range []string{salt, c.Name, c.question} {
		fmt.Fprintf(h, "%d:%s", len(s), s)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// epoch is the time of a context's files. It is another for every case:
// BuildKit takes files of one name, size and time for the same, whatever context they come from.
func (c *Case) epoch() time.Time {
	return time.Unix(1700000000+int64(crc32.ChecksumIEEE([]byte(c.Name))%10_000_000), 0)
}

// Write makes the case's context in dir, which must not exist.
func (c *Case) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, f := range c.files {
		p := filepath.Join(dir, filepath.FromSlash(path.Clean("/"+f.Name)))
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(p, f.Data, 0o644); err != nil {
			return err
		}
	}
	start := time.Now().Add(-time.Minute)
	if err := kilnrun.Own(dir); err != nil {
		return err
	}
	if err := runSetup(dir); err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil || fi.ModTime().Before(start) || fi.Mode()&fs.ModeSymlink != 0 {
			return err
		}
		return os.Chtimes(p, c.epoch(), c.epoch())
	})
}

func runSetup(dir string) error {
	script := filepath.Join(dir, "setup.sh")
	if _, err := os.Stat(script); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	cmd := exec.Command("bash", "-eu", "setup.sh")
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "TZ=UTC"}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: kilnrun.Nobody, Gid: kilnrun.Nobody}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run setup.sh: %w\n%s", err, out)
	}
	return os.Remove(script)
}

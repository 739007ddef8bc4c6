package engine_test

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kiln-build/kiln/internal/engine"
	"github.com/kiln-build/kiln/internal/engine/llb"
	"github.com/kiln-build/kiln/internal/fileop"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/source"
	"github.com/kiln-build/kiln/internal/tree/memtree"
)

// variant is a build; its key is that of its last step.
type variant struct {
	dockerfile string
	files      map[string]memtree.File // on top of the usual context
	change     func(*frontend.Input)
}

func contextFiles() map[string]memtree.File {
	return map[string]memtree.File{
		"a": {Data: "a"}, "b": {Data: "b"}, "dir/f": {Data: "f"}, "dir/g.md": {Data: "g"}, "link": {Link: "a"},
	}
}

func (v variant) key(t *testing.T) digest.Digest {
	t.Helper()
	files := contextFiles()
	maps.Copy(files, v.files)
	in := frontend.Input{
		Filename: "Dockerfile", Platforms: []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}, BuildArgs: map[string]string{},
		NamedContexts: map[string]string{"other": "local:other"},
		Contexts: source.Trees{
			frontend.ContextName:    memtree.New(files),
			frontend.DockerfileName: memtree.New(map[string]memtree.File{"Dockerfile": {Data: v.dockerfile}}),
			"other":                 memtree.New(map[string]memtree.File{"x": {Data: "x"}}),
		},
	}
	if v.change != nil {
		v.change(&in)
	}
	plan, err := frontend.Load(context.Background(), in, catalogue{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	g, err := llb.Decode(plan.Platforms[0].Definition)
	if err != nil {
		t.Fatal(err)
	}
	k, err := engine.Key(context.Background(), engine.Config{Images: catalogue{}, Contexts: in.Contexts}, g)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func arg(k, v string) func(*frontend.Input) {
	return func(in *frontend.Input) { in.BuildArgs[k] = v }
}

func one(path string, f memtree.File) map[string]memtree.File {
	return map[string]memtree.File{path: f}
}

func TestKeys(t *testing.T) {
	const run = "FROM base:1\nRUN make\n"
	const cp = "FROM base:1\nCOPY a dir /d/\nRUN make\n"
	for _, c := range []struct {
		name string
		a, b variant
		same bool
	}{
		// What the result does not depend on.
		{"itself", variant{dockerfile: cp}, variant{dockerfile: cp}, true},
		{"comments and lines", variant{dockerfile: run}, variant{dockerfile: "# x\n\n\nFROM base:1\n\nRUN   make\n"}, true},
		{"the stage's name", variant{dockerfile: run}, variant{dockerfile: "FROM base:1 AS x\nRUN make\n"}, true},
		{"labels", variant{dockerfile: run}, variant{dockerfile: "FROM base:1\nLABEL a=b\nRUN make\n"}, true},
		{"another name of the image", variant{dockerfile: run}, variant{dockerfile: strings.ReplaceAll(run, "base:1", "alias-base:1")}, true},
		{"an unused stage", variant{dockerfile: run}, variant{dockerfile: "FROM base:2 AS x\nRUN false\n" + run}, true},
		{"an unused file", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("b", memtree.File{Data: "other"})}, true},
		{"times of files", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("a", memtree.File{Data: "a", MTime: time.Unix(1e9, 0)})}, true},
		{"proxies", variant{dockerfile: run, change: arg("HTTP_PROXY", "http://a")}, variant{dockerfile: run}, true},
		{"an argument that is not declared", variant{dockerfile: run, change: arg("X", "1")}, variant{dockerfile: run}, true},
		{"no-cache", variant{dockerfile: run, change: func(in *frontend.Input) { in.NoCache = true }}, variant{dockerfile: run}, true},
		{"what is excluded", variant{dockerfile: "FROM base:1\nCOPY --exclude=*.md dir /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --exclude=*.md dir /d\n", files: one("dir/g.md", memtree.File{Data: "other"})}, true},
		{
			"what is ignored",
			variant{dockerfile: "FROM base:1\nCOPY dir /d\n", files: one(".dockerignore", memtree.File{Data: "dir/*.md"})},
			variant{dockerfile: "FROM base:1\nCOPY dir /d\n", files: map[string]memtree.File{".dockerignore": {Data: "dir/*.md"}, "dir/g.md": {Data: "other"}}},
			true,
		},
		{"the context's name", variant{dockerfile: "FROM base:1\nCOPY --from=other x /x\n"}, variant{dockerfile: "FROM base:1\nCOPY x /x\n", files: one("x", memtree.File{Data: "x"})}, true},

		// What it does depend on.
		{"the command", variant{dockerfile: run}, variant{dockerfile: "FROM base:1\nRUN make \n RUN true"}, false},
		{"where a command is cut", variant{dockerfile: "FROM base:1\nRUN [\"a\",\"b c\"]"}, variant{dockerfile: "FROM base:1\nRUN [\"a\",\"b\",\"c\"]"}, false},
		{"the base", variant{dockerfile: run}, variant{dockerfile: strings.ReplaceAll(run, "base:1", "base:2")}, false},
		{"ENV", variant{dockerfile: run}, variant{dockerfile: "FROM base:1\nENV A=1\nRUN make\n"}, false},
		{"order of ENV", variant{dockerfile: "FROM base:1\nENV A=1 B=2\nRUN make\n"}, variant{dockerfile: "FROM base:1\nENV B=2 A=1\nRUN make\n"}, false},
		{"ARG", variant{dockerfile: "FROM base:1\nARG X\nRUN make\n", change: arg("X", "1")}, variant{dockerfile: "FROM base:1\nARG X\nRUN make\n", change: arg("X", "2")}, false},
		{"USER", variant{dockerfile: run}, variant{dockerfile: "FROM base:1\nUSER 1\nRUN make\n"}, false},
		{"SHELL", variant{dockerfile: run}, variant{dockerfile: "FROM base:1\nSHELL [\"/bin/bash\",\"-c\"]\nRUN make\n"}, false},
		{"network", variant{dockerfile: run}, variant{dockerfile: "FROM base:1\nRUN --network=none make\n"}, false},
		{"hosts", variant{dockerfile: run, change: func(in *frontend.Input) { in.AddHosts = []string{"a:10.0.0.1"} }}, variant{dockerfile: run, change: func(in *frontend.Input) { in.AddHosts = []string{"a:10.0.0.2"} }}, false},
		{"platform", variant{dockerfile: run}, variant{dockerfile: run, change: func(in *frontend.Input) {
			in.Platforms = []ocispec.Platform{{OS: "linux", Architecture: "arm64"}}
		}}, false},
		{"variant", variant{dockerfile: run, change: func(in *frontend.Input) {
			in.Platforms = []ocispec.Platform{{OS: "linux", Architecture: "arm", Variant: "v6"}}
		}}, variant{dockerfile: run, change: func(in *frontend.Input) {
			in.Platforms = []ocispec.Platform{{OS: "linux", Architecture: "arm", Variant: "v7"}}
		}}, false},
		{"content", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("a", memtree.File{Data: "b"})}, false},
		{"content below", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("dir/f", memtree.File{Data: "b"})}, false},
		{"a new file below", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("dir/new", memtree.File{})}, false},
		{"mode of a file", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("a", memtree.File{Data: "a", Mode: 0o755})}, false},
		{"mode of a directory", variant{dockerfile: "FROM base:1\nCOPY . /d/\n"}, variant{dockerfile: "FROM base:1\nCOPY . /d/\n", files: one("dir/", memtree.Dir(0o700))}, false},
		{"owner", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("a", memtree.File{Data: "a", UID: 1})}, false},
		{"type", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("a", memtree.File{Link: "b"})}, false},
		{"what a link names", variant{dockerfile: "FROM base:1\nCOPY dir /d\n", files: one("dir/l", memtree.File{Link: "f"})}, variant{dockerfile: "FROM base:1\nCOPY dir /d\n", files: one("dir/l", memtree.File{Link: "g"})}, false},
		{"what is behind a link that is followed", variant{dockerfile: "FROM base:1\nCOPY link /d\n"}, variant{dockerfile: "FROM base:1\nCOPY link /d\n", files: one("a", memtree.File{Data: "b"})}, false},
		{"an attribute", variant{dockerfile: cp}, variant{dockerfile: cp, files: one("a", memtree.File{Data: "a", Xattr: map[string]string{"security.capability": "x"}})}, false},
		{"what a wildcard matches", variant{dockerfile: "FROM base:1\nCOPY ?* /d/\n"}, variant{dockerfile: "FROM base:1\nCOPY ?* /d/\n", files: one("new", memtree.File{})}, false},
		{"destination", variant{dockerfile: "FROM base:1\nCOPY a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY a /e\n"}, false},
		{"COPY and ADD", variant{dockerfile: "FROM base:1\nCOPY a /d\n"}, variant{dockerfile: "FROM base:1\nADD a /d\n"}, false},
		{"chown", variant{dockerfile: "FROM base:1\nCOPY --chown=1 a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --chown=2 a /d\n"}, false},
		{"chown by name", variant{dockerfile: "FROM base:1\nCOPY --chown=a a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --chown=b a /d\n"}, false},
		{"the passwd of chown", variant{dockerfile: "FROM base:1\nCOPY --chown=a a /d\n"}, variant{dockerfile: "FROM base:2\nCOPY --chown=a a /d\n"}, false},
		{"the group of chown", variant{dockerfile: "FROM base:1\nCOPY --chown=1 a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --chown=1:0 a /d\n"}, false},
		{"chmod", variant{dockerfile: "FROM base:1\nCOPY --chmod=600 a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --chmod=u=rw a /d\n"}, false},
		{"link", variant{dockerfile: "FROM base:1\nCOPY a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --link a /d\n"}, false},
		{"link on another base", variant{dockerfile: "FROM base:1\nCOPY --link a /d\n"}, variant{dockerfile: "FROM base:2\nCOPY --link a /d\n"}, false},
		{"exclude", variant{dockerfile: "FROM base:1\nCOPY --exclude=*.md dir /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --exclude=f dir /d\n"}, false},
		{"the stage copied from", variant{dockerfile: "FROM base:1 AS s\nRUN a\nFROM base:1\nCOPY --from=s /a /d\n"}, variant{dockerfile: "FROM base:1 AS s\nRUN b\nFROM base:1\nCOPY --from=s /a /d\n"}, false},
		{"the image copied from", variant{dockerfile: "FROM base:1\nCOPY --from=base:2 /a /d\n"}, variant{dockerfile: "FROM base:1\nCOPY --from=base:3 /a /d\n"}, false},
		{"a heredoc", variant{dockerfile: "FROM base:1\nCOPY <<x /d\n1\nx\n"}, variant{dockerfile: "FROM base:1\nCOPY <<x /d\n2\nx\n"}, false},
		{"WORKDIR", variant{dockerfile: "FROM base:1\nWORKDIR /a\n"}, variant{dockerfile: "FROM base:1\nWORKDIR /b\n"}, false},
		{"RUN's directory", variant{dockerfile: "FROM base:1\nWORKDIR /a/b\nWORKDIR /a\nRUN make\n"}, variant{dockerfile: "FROM base:1\nWORKDIR /a/b\nRUN make\n"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if a, b := c.a.key(t), c.b.key(t); (a == b) != c.same {
				t.Errorf("the keys are %s and %s", a, b)
			}
		})
	}
}

// TestEveryFieldIsInTheKey changes each field of each operation: one that is added and
// forgotten is found here.
func TestEveryFieldIsInTheKey(t *testing.T) {
	t1 := time.Unix(1, 0)
	mode := uint32(0o700)
	owner := &fileop.Owner{User: &fileop.ID{Num: 1}, Group: &fileop.ID{Name: "x"}}
	notInKey := map[string]bool{"Exec.Proxy": true, "ID.Tree": true, "CacheMount.ID": true, "CacheMount.Sharing": true}
	for name, fresh := range map[string]func() engine.Operation{
		"exec": func() engine.Operation {
			return &engine.Exec{
				Args: []string{"a"}, Env: []string{"b"}, Hosts: []engine.Host{{Name: "h", IP: "i"}}, SecretEnv: []engine.SecretEnv{{Name: "n", ID: "s"}},
				Ulimits: []engine.Ulimit{{}}, Success: []int{3}, Results: []int{engine.Root, 0}, Mounts: []engine.Mount{
					{Dest: "/b"},
					{Dest: "/t", Tmpfs: &engine.TmpfsMount{}},
					{Dest: "/c", Cache: &engine.CacheMount{}},
					{Dest: "/s", Secret: &engine.SecretMount{}},
					{Dest: "/a", SSH: &engine.SSHMount{}},
				},
			}
		},
		"copy": func() engine.Operation {
			return &engine.File{Actions: []engine.Action{{}, {Copy: &fileop.CopyAction{Owner: owner, Mode: &mode, Timestamp: &t1}}}}
		},
		"mkfile": func() engine.Operation {
			return &engine.File{Actions: []engine.Action{{}, {Mkfile: &fileop.MkfileAction{Owner: owner, Timestamp: &t1}}}}
		},
		"mkdir": func() engine.Operation {
			return &engine.File{Actions: []engine.Action{{}, {Mkdir: &fileop.MkdirAction{Owner: owner, Timestamp: &t1}}}}
		},
		"remove": func() engine.Operation {
			return &engine.File{Actions: []engine.Action{{}, {Remove: &fileop.RemoveAction{}}}}
		},
		"link": func() engine.Operation {
			return &engine.File{Actions: []engine.Action{{}, {Link: &fileop.SymlinkAction{Owner: owner, Timestamp: &t1}}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			seen := map[digest.Digest]string{}
			check := func(what string, op engine.Operation) {
				t.Helper()
				o := &engine.Op{Do: op, Inputs: make([]engine.Input, 2)}
				k, err := engine.Key(context.Background(), engine.Config{}, &engine.Graph{Ops: []*engine.Op{o}, Target: engine.Input{Op: o}})
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if other, ok := seen[k]; ok {
					t.Errorf("%s and %s have one key", what, other)
				}
				seen[k] = what
			}
			op := fresh()
			check("nothing changed", op)
			eachField(reflect.ValueOf(op).Elem(), "", func(path string) {
				if !notInKey[path] {
					check(path, op)
				}
			})
			if len(seen) < 4 {
				t.Errorf("only %v were changed", seen)
			}
		})
	}
}

// eachField changes one leaf after the other, calls fn, and changes it back.
func eachField(v reflect.Value, path string, fn func(string)) {
	old := reflect.New(v.Type()).Elem()
	old.Set(v)
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(v.Uint() + 1)
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Pointer:
		if v.IsNil() {
			return // another kind of action
		}
		if tm, ok := v.Interface().(*time.Time); ok {
			later := tm.Add(1)
			v.Set(reflect.ValueOf(&later))
			break
		}
		eachField(v.Elem(), path, fn)
		v.SetZero()
		if k := old.Type().Elem().Name(); strings.HasSuffix(k, "Action") {
			v.Set(old)
			return // an action of no kind
		}
	case reflect.Slice:
		for i := range v.Len() {
			if v.Index(i).Kind() != reflect.Uint8 {
				eachField(v.Index(i), fmt.Sprintf("%s[%d]", path, i), fn)
			}
		}
		if v.Type().Elem().Kind() == reflect.Struct && v.Type().Elem().Name() == "Action" {
			return
		}
		v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			// Of a platform the fields that name features are for selection alone.
			if f.Name == "OSVersion" || f.Name == "OSFeatures" {
				continue
			}
			eachField(v.Field(i), v.Type().Name()+"."+f.Name, fn)
		}
		return
	default:
		return
	}
	fn(path)
	v.Set(old)
}

package git

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// Ref is a build context in a git repository, as people write it: the forms and
// their meaning are those of BuildKit's Dockerfile front end.
type Ref struct {
	// Remote is the repository's URL without fragment and query, but with the
	// user and password that it may have.
	Remote string
	// Rev is a branch, a tag, any other ref or a full commit hash; empty: the
	// default branch.
	Rev string
	// Checksum is what the commit's hash, or the tag's, must begin with.
	Checksum string
	// Subdir is a directory in the repository, cleaned; empty: its root.
	Subdir string
	// KeepGitDir and SkipSubmodules are what the query says.
	KeepGitDir, SkipSubmodules bool
	// MTime is "checkout", "commit" or, if nothing was said, empty.
	MTime string
	// FetchByCommit: Checksum is a full hash and is the commit to take, wherever
	// Rev leads to by now.
	FetchByCommit bool
}

// ErrNotGit is what Parse gives for something that is no git URL.
var ErrNotGit = errors.New("not a git URL")

var (
	protocol = regexp.MustCompile(`^[a-zA-Z0-9]+://`)
	scpStyle = regexp.MustCompile(`^([a-zA-Z0-9-_]+)@([a-zA-Z0-9-.]+):(.*?)(?:\?(.*?))?(?:#(.*))?$`)
	hexOnly  = regexp.MustCompile(`^[a-fA-F0-9]+$`)
)

// Parse parses a git URL: https://host/path.git, http://host/path.git, git://…,
// ssh://…, user@host:path, github.com/…, each with an optional query and
// #ref:subdir. If ErrNotGit is in the error's chain, s may be something else;
// any other error says what is wrong with a git URL.
func Parse(s string) (*Ref, error) { return parse(s, true) }

// ParseRemote is Parse where s is known to be a repository: its path need not end in ".git".
func ParseRemote(s string) (*Ref, error) { return parse(s, false) }

func parse(s string, suffix bool) (*Ref, error) {
	r, query, err := parseRemote(s, suffix)
	if err != nil {
		return nil, err
	}
	if err := r.loadQuery(query); err != nil {
		return nil, fmt.Errorf("git URL: %w", err)
	}
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("git URL: %w", err)
	}
	return r, nil
}

func parseRemote(s string, suffix bool) (*Ref, url.Values, error) {
	switch {
	case strings.HasPrefix(s, "./"), strings.HasPrefix(s, "../"):
		return nil, nil, ErrNotGit
	case strings.HasPrefix(s, "github.com/"):
		return parseURL("https://"+s, false)
	}
	if proto := protocol.FindString(s); proto != "" {
		switch strings.ToLower(strings.TrimSuffix(proto, "://")) {
		case "http", "https":
			return parseURL(s, suffix)
		case "git", "ssh":
			return parseURL(s, false)
		}
		return nil, nil, ErrNotGit
	}
	m := scpStyle.FindStringSubmatch(s)
	if m == nil {
		return nil, nil, ErrNotGit
	}
	query, err := url.ParseQuery(m[4])
	if err != nil {
		return nil, nil, ErrNotGit
	}
	r := &Ref{Remote: m[1] + "@" + m[2] + ":" + m[3]}
	r.fragment(m[5])
	return r, query, nil
}

// parseURL parses a URL proper. With suffix, it is one of a repository only if
// its path ends in ".git": any web page has such a URL otherwise.
func parseURL(s string, suffix bool) (*Ref, url.Values, error) {
	u, err := url.Parse(s)
	if err != nil || suffix && !strings.HasSuffix(u.Path, ".git") {
		return nil, nil, ErrNotGit // and not err, which has the URL's password in it
	}
	r, query := &Ref{}, u.Query()
	r.fragment(u.Fragment)
	u.Fragment, u.RawFragment, u.RawQuery, u.ForceQuery = "", "", "", false
	r.Remote = u.String()
	return r, query, nil
}

// fragment takes in "ref:subdir".
func (r *Ref) fragment(f string) {
	ref, subdir, _ := strings.Cut(f, ":")
	r.Rev, r.Subdir = ref, cleanSubdir(subdir)
}

func cleanSubdir(s string) string { return strings.TrimPrefix(path.Join("/", s), "/") }

// loadQuery takes in what the URL's query says.
func (r *Ref) loadQuery(query url.Values) error {
	refs := map[string]string{}
	for k, vs := range query {
		if len(vs) > 1 {
			return fmt.Errorf("query %q has several values", k)
		}
		v := vs[0]
		switch k {
		case "submodules", "keep-git-dir", "fetch-by-commit":
			if err := r.loadFlag(k, v); err != nil {
				return err
			}
			continue
		}
		if v == "" {
			return fmt.Errorf("query %q has no value", k)
		}
		switch k {
		case "ref", "tag", "branch":
			refs[k] = v
		case "subdir":
			v = cleanSubdir(v)
			if r.Subdir != "" && r.Subdir != v {
				return fmt.Errorf("subdirectories conflict: %q and %q", r.Subdir, v)
			}
			r.Subdir = v
		case "checksum", "commit":
			if r.Checksum != "" && r.Checksum != v {
				return fmt.Errorf("checksums conflict: %q and %q", r.Checksum, v)
			}
			r.Checksum = v
		case "mtime":
			if v != "checkout" && v != "commit" {
				return fmt.Errorf("mtime %q is neither \"checkout\" nor \"commit\"", v)
			}
			r.MTime = v
		default:
			return fmt.Errorf("unknown query %q", k)
		}
	}
	return r.loadRefs(refs)
}

// loadFlag takes in a query whose value may be left out.
func (r *Ref) loadFlag(k, v string) error {
	on := true
	if v != "" {
		var err error
		if on, err = strconv.ParseBool(v); err != nil {
			return fmt.Errorf("query %q has the value %q, which is neither true nor false", k, v)
		}
	}
	switch k {
	case "submodules":
		r.SkipSubmodules = !on
	case "keep-git-dir":
		r.KeepGitDir = on
	case "fetch-by-commit":
		r.FetchByCommit = on
	}
	return nil
}

// loadRefs takes in ref, tag and branch, which must not contradict each other
// nor the fragment.
func (r *Ref) loadRefs(refs map[string]string) error {
	if refs["branch"] != "" && refs["tag"] != "" {
		return errors.New("branch conflicts with tag")
	}
	for _, k := range []string{"ref", "tag", "branch"} {
		v := refs[k]
		switch {
		case v == "":
			continue
		case k == "tag" && !strings.HasPrefix(v, "refs/tags/"):
			v = "refs/tags/" + v
		case k == "branch" && !strings.HasPrefix(v, "refs/heads/"):
			v = "refs/heads/" + v
		}
		if r.Rev != "" && r.Rev != v {
			return fmt.Errorf("refs conflict: %q and %q", r.Rev, v)
		}
		r.Rev = v
	}
	return nil
}

// validate refuses what git could take for something else than it is.
// Validate checks that r means something to git, and nothing but a ref.
func (r *Ref) Validate() error {
	if strings.HasPrefix(r.Remote, "-") || strings.ContainsAny(r.Remote, "\x00\n\r") {
		return errors.New("the repository's address is invalid")
	}
	// What no ref can have, and what has a meaning in refspecs and to rev-parse.
	if strings.HasPrefix(r.Rev, "-") || strings.ContainsAny(r.Rev, "\x00\n\r\t :?[\\^~*") || strings.Contains(r.Rev, "..") || strings.Contains(r.Rev, "@{") {
		return fmt.Errorf("invalid ref %q", r.Rev)
	}
	if r.Checksum != "" && !hexOnly.MatchString(r.Checksum) {
		return fmt.Errorf("invalid checksum %q, want a commit's hash in hexadecimal", r.Checksum)
	}
	r.Checksum = strings.ToLower(r.Checksum)
	if r.FetchByCommit && !isHash(r.Checksum) && !isHash(r.Rev) {
		return errors.New("fetch-by-commit needs the full hash of a commit as checksum or ref")
	}
	if strings.ContainsRune(r.Subdir, 0) {
		return errors.New("the subdirectory is invalid")
	}
	return nil
}

// isHash reports whether s is a full SHA-1 or SHA-256 hash as git writes it.
func isHash(s string) bool {
	if len(s) != 40 && len(s) != 64 {
		return false
	}
	return strings.IndexFunc(s, func(c rune) bool { return (c < '0' || c > '9') && (c < 'a' || c > 'f') }) < 0
}

// String describes the context, without credentials.
func (r *Ref) String() string {
	s := Redact(r.Remote)
	if r.Rev != "" || r.Subdir != "" {
		s += "#" + r.Rev
	}
	if r.Subdir != "" {
		s += ":" + r.Subdir
	}
	return s
}

// Redact returns a repository's URL without the credentials in it.
func Redact(remote string) string {
	if !protocol.MatchString(remote) {
		return remote // user@host:path has no password
	}
	u, err := url.Parse(remote)
	if err != nil {
		return "(URL that cannot be parsed)"
	}
	if u.User == nil {
		return remote
	}
	user := u.User.Username()
	if u.User = nil; u.Scheme == "ssh" {
		u.User = url.User(user) // no secret, and nothing works without
	}
	return u.String()
}

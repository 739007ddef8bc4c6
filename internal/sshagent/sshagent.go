// Package sshagent knows the SSH agents that a user passes to a build: the one that
// runs already, behind its socket, or one made in this process of key files. A build can have
// things signed by an agent and ask for its public keys; it can neither read a private key nor change anything.
package sshagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/sys/unix"
)

// DefaultID is the ID of an agent that has none.
const DefaultID = "default"

// maxKey bounds a key file in bytes.
const maxKey = 100 << 10

// Source says what an agent is: the socket of one, or private keys.
type Source struct {
	ID string
	// Paths are one socket, or files with keys. None: the socket in $SSH_AUTH_SOCK.
	Paths []string
	// Raw: what is said to the socket is not looked at. It need not be an agent's.
	Raw bool
}

// Parse reads an --ssh option as docker and buildctl do: default|ID[=SOCKET|KEY[,KEY…]][,raw=true].
func Parse(s string) (Source, error) {
	id, paths, ok := strings.Cut(s, "=")
	src := Source{ID: id}
	if src.ID == "" {
		src.ID = DefaultID
	}
	if ok {
		for _, p := range strings.Split(paths, ",") {
			v, raw := strings.CutPrefix(p, "raw=")
			if !raw {
				src.Paths = append(src.Paths, p)
				continue
			}
			var err error
			if src.Raw, err = strconv.ParseBool(v); err != nil {
				return Source{}, fmt.Errorf("raw=%q is neither true nor false", v)
			}
		}
	}
	if src.Raw && len(src.Paths) != 1 {
		return Source{}, errors.New("raw needs the path of one socket")
	}
	return src, nil
}

// Agents are the SSH agents of a build. Safe for concurrent use.
type Agents struct {
	dial map[string]func(ctx context.Context) (net.Conn, error)
}

// Open opens the agents. getenv knows the environment. Every socket and key file must be there.
func Open(sources []Source, getenv func(string) string) (*Agents, error) {
	a := &Agents{dial: map[string]func(context.Context) (net.Conn, error){}}
	for _, s := range sources {
		if a.dial[s.ID] != nil {
			return nil, fmt.Errorf("SSH agent %q is given twice", s.ID)
		}
		d, err := open(s, getenv)
		if err != nil {
			return nil, fmt.Errorf("SSH agent %q: %w", s.ID, err)
		}
		a.dial[s.ID] = d
	}
	return a, nil
}

// NoneError is the error of an agent that was not passed, an fs.ErrNotExist.
type NoneError struct {
	Said string // by whoever was asked for it; may be empty
}

// Error implements error.
func (e *NoneError) Error() string {
	if e.Said != "" {
		return e.Said
	}
	return "there is no such agent"
}

// Is makes the error an fs.ErrNotExist.
func (e *NoneError) Is(target error) bool { return target == fs.ErrNotExist }

// DialAgent connects to an agent. The error is fs.ErrNotExist if none of that ID was passed.
func (a *Agents) DialAgent(ctx context.Context, id string) (net.Conn, error) {
	d := a.dial[id]
	if d == nil {
		return nil, &NoneError{}
	}
	c, err := d(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("its socket is gone: %v", err) //nolint:errorlint // it was passed, so that it is not missing
	}
	return c, err
}

func open(s Source, getenv func(string) string) (func(context.Context) (net.Conn, error), error) {
	paths := s.Paths
	if len(paths) == 0 || len(paths) == 1 && paths[0] == "" {
		paths = []string{getenv("SSH_AUTH_SOCK")}
		if paths[0] == "" {
			return nil, errors.New("$SSH_AUTH_SOCK is not set: start an agent, or name its socket or key files")
		}
	}
	keys := agent.NewKeyring()
	for i, p := range paths {
		fi, err := os.Stat(p)
		switch {
		case err != nil:
			return nil, err
		case fi.Mode()&fs.ModeSocket != 0 && len(paths) > 1:
			return nil, errors.New("a socket must be the only path")
		case fi.Mode()&fs.ModeSocket != 0:
			return socket(p, s.Raw), nil
		case s.Raw:
			return nil, fmt.Errorf("raw needs a socket, which %q is not", p)
		}
		if err := addKey(keys, p); err != nil {
			return nil, fmt.Errorf("key %d, %q: %w", i+1, p, err)
		}
	}
	signer, ok := keys.(agent.ExtendedAgent) // or RSA keys would sign with SHA-1 alone
	if !ok {
		return nil, fmt.Errorf("an agent of type %T cannot choose how it signs", keys)
	}
	return func(context.Context) (net.Conn, error) { return serve(signer, nil) }, nil
}

func addKey(keys agent.Agent, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxKey+1))
	if err != nil {
		return err
	}
	if len(b) > maxKey {
		return fmt.Errorf("it has more than %d bytes", maxKey)
	}
	k, err := ssh.ParseRawPrivateKey(b)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return errors.New("it is protected by a passphrase: add it to an agent (ssh-add), and pass the agent")
	}
	if err != nil {
		return errors.New("it is neither a socket nor a private key") // the parser's own words might quote it
	}
	return keys.Add(agent.AddedKey{PrivateKey: k})
}

// socket dials an agent behind a socket.
func socket(path string, raw bool) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		c, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "unix", path)
		if err != nil || raw {
			return c, err
		}
		return serve(agent.NewClient(c), c)
	}
}

// serve connects to an agent through one that lets nothing be changed. done is closed with the connection.
func serve(a agent.ExtendedAgent, done io.Closer) (net.Conn, error) {
	ours, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	go func() {
		defer ours.Close()
		_ = agent.ServeAgent(readOnly{a}, ours) // ends with the connection
		if done != nil {
			done.Close()
		}
	}()
	return theirs, nil
}

// pair is a connection that can be closed one way, which net.Pipe's cannot.
func pair() (a, b net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "agent")
		c, ferr := net.FileConn(f)
		f.Close() // it was duplicated
		conns[i], err = c, errors.Join(err, ferr)
	}
	return conns[0], conns[1], err
}

// readOnly is an agent that signs and tells its public keys.
type readOnly struct{ agent.ExtendedAgent }

var errReadOnly = errors.New("a build cannot change the agent")

// Add implements agent.Agent.
func (readOnly) Add(agent.AddedKey) error { return errReadOnly }

// Remove implements agent.Agent.
func (readOnly) Remove(ssh.PublicKey) error { return errReadOnly }

// RemoveAll implements agent.Agent.
func (readOnly) RemoveAll() error { return errReadOnly }

// Lock implements agent.Agent.
func (readOnly) Lock([]byte) error { return errReadOnly }

// Unlock implements agent.Agent.
func (readOnly) Unlock([]byte) error { return errReadOnly }

// Extension implements agent.ExtendedAgent.
func (readOnly) Extension(string, []byte) ([]byte, error) {
	return nil, agent.ErrExtensionUnsupported
}

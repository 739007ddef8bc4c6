package buildkitd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/kiln-build/kiln/internal/diag"
)

// ListenOptions say how clients are let in.
type ListenOptions struct {
	// TLS is for tcp addresses; nil: whoever can connect may use the server.
	TLS *tls.Config
	// GID owns Unix sockets, and its members may use them; negative: the user alone.
	GID int
}

// DefaultAddr is where clients look for a server of the user with that id, as BuildKit's do.
func DefaultAddr(uid int, getenv func(string) string) string {
	if dir, _, _ := strings.Cut(getenv("XDG_RUNTIME_DIR"), ":"); dir != "" && uid != 0 {
		return "unix://" + filepath.Join(dir, "buildkit", "buildkitd.sock")
	}
	return "unix:///run/buildkit/buildkitd.sock"
}

// Listen listens on an address, unix://PATH or tcp://HOST:PORT.
func Listen(addr string, o ListenOptions) (net.Listener, error) {
	proto, rest, ok := strings.Cut(addr, "://")
	switch {
	case ok && proto == "unix" && rest != "":
		return listenUnix(rest, o.GID)
	case ok && proto == "tcp" && rest != "":
		l, err := net.Listen("tcp", rest)
		if err != nil {
			return nil, diag.New(diag.ExitFailure, "listen on %s: %w", addr, err)
		}
		if o.TLS != nil {
			return tls.NewListener(l, o.TLS), nil
		}
		return l, nil
	}
	return nil, diag.New(diag.ExitUsage, "address %q is neither unix://PATH nor tcp://HOST:PORT", addr)
}

// Open reports whether somebody on another machine could reach l.
func Open(l net.Listener) bool {
	a, ok := l.Addr().(*net.TCPAddr)
	return ok && !a.IP.IsLoopback()
}

// listenUnix makes a socket that its user, and perhaps a group, can use and nobody else: it is made in
// a directory that nobody else can enter, and moved.
func listenUnix(path string, gid int) (_ net.Listener, err error) {
	fail := func(err error) (net.Listener, error) {
		return nil, diag.New(diag.ExitFailure, "listen on socket %q: %w", path, err)
	}
	if path, err = filepath.Abs(path); err != nil {
		return fail(err)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fail(err)
	}
	if err := removeStale(path); err != nil {
		return fail(err)
	}
	private, err := os.MkdirTemp(dir, ".kiln-") // 0700
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(private)
	tmp := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return fail(err)
	}
	l.SetUnlinkOnClose(false) // it is elsewhere
	mode := fs.FileMode(0o600)
	if gid >= 0 {
		mode = 0o660
		if err := os.Chown(tmp, -1, gid); err != nil {
			return fail(errors.Join(err, l.Close()))
		}
	}
	if err := errors.Join(os.Chmod(tmp, mode), os.Rename(tmp, path)); err != nil {
		return fail(errors.Join(err, l.Close()))
	}
	return &unixListener{Listener: l, path: path}, nil
}

// removeStale takes away the socket of a server that is gone.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != fs.ModeSocket {
		return errors.New("there is a file that is no socket")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return errors.New("another server listens there")
	}
	return os.Remove(path)
}

// unixListener takes its socket away when it is closed.
type unixListener struct {
	net.Listener
	path string
}

// Addr is where clients connect to.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close closes the listener.
func (l *unixListener) Close() error {
	_ = os.Remove(l.path)
	return l.Listener.Close()
}

// ServerTLS is the configuration for clients that verify the server's certificate, and, with ca, are
// verified by theirs. All are names of files in PEM.
func ServerTLS(cert, key, ca string) (*tls.Config, error) {
	fail := func(err error) (*tls.Config, error) { return nil, diag.New(diag.ExitUsage, "TLS: %w", err) }
	if cert == "" || key == "" {
		return fail(errors.New("a certificate and its key are both needed"))
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return fail(err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}}
	if ca == "" {
		return c, nil
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return fail(err)
	}
	c.ClientCAs = x509.NewCertPool()
	if !c.ClientCAs.AppendCertsFromPEM(pem) {
		return fail(fmt.Errorf("there is no certificate in %s", ca))
	}
	c.ClientAuth = tls.RequireAndVerifyClientCert
	return c, nil
}

// transport tells gRPC about connections that listeners have secured, or not.
type transport struct {
	credentials.TransportCredentials
	log *slog.Logger
}

func newTransport(log *slog.Logger) transport { return transport{insecure.NewCredentials(), log} }

const (
	// handshakeTimeout bounds how long a client may take for its part of a TLS handshake.
	handshakeTimeout = 10 * time.Second
	// refuseTimeout and maxRefused bound for how long, and how many bytes, one that is refused is listened to.
	refuseTimeout = 2 * time.Second
	maxRefused    = 64 << 10
)

// ServerHandshake implements credentials.TransportCredentials.
func (t transport) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	tc, ok := c.(*tls.Conn)
	if !ok {
		return t.TransportCredentials.ServerHandshake(c)
	}
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		t.log.Info("a client was refused", "addr", c.RemoteAddr(), "error", err)
		refuse(tc)
		return nil, nil, err
	}
	info := credentials.TLSInfo{State: tc.ConnectionState()}
	info.SecurityLevel = credentials.PrivacyAndIntegrity
	return tc, info, nil
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials {
	return transport{t.TransportCredentials.Clone(), t.log}
}

// refuse ends the connection of a client that is not let in. It has been told why, and has perhaps sent
// more by then: that is read, or closing would take from it what it was told.
func refuse(c *tls.Conn) {
	if half, ok := c.NetConn().(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_ = c.NetConn().SetReadDeadline(time.Now().Add(refuseTimeout))
		_, _ = io.Copy(io.Discard, io.LimitReader(c.NetConn(), maxRefused))
	}
	_ = c.NetConn().Close()
}

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/distribution/reference"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry"
	"github.com/kiln-build/kiln/internal/registry/auth"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

const maxPassword = 64 << 10

type loginFlags struct {
	user, password string
	stdin          bool
	insecure       []string
}

func newLoginCommand(app *App) *cobra.Command {
	var f loginFlags
	cmd := &cobra.Command{
		Use:   "login [OPTIONS] [REGISTRY]",
		Short: "Keep a user name and password for a registry",
		Long: `Ask a registry (Docker Hub if none is given) whether it takes a user name and password,
and keep them where docker does: in the credential helper that docker's config.json
names, or else in that file. Docker, podman and kiln see each other's logins.

Amazon's registries need no login: name the helper ecr-login, which is built in, in
config.json.`,
		Example: `  kiln login registry.example
  echo "$TOKEN" | kiln login -u ci --password-stdin registry.example`,
		Args:              nargs(0, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	fl := cmd.Flags()
	fl.StringVarP(&f.user, "username", "u", "", "user name")
	fl.StringVarP(&f.password, "password", "p", "", "password or token; others on this machine can see it: use --password-stdin")
	fl.BoolVar(&f.stdin, "password-stdin", false, "read the password or token from standard input")
	fl.StringArrayVar(&f.insecure, "insecure-registry", nil, insecureHelp)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		host, err := registryHost(cmd, args)
		if err != nil {
			return err
		}
		if err := f.check(cmd); err != nil {
			return err
		}
		return app.login(cmd, host, f)
	}
	return cmd
}

func (f *loginFlags) check(cmd *cobra.Command) error {
	changed := cmd.Flags().Changed
	switch {
	case changed("password") && f.stdin:
		return usageError(cmd, "--password and --password-stdin contradict each other")
	case changed("username") && f.user == "":
		return usageError(cmd, "the user name is empty")
	case changed("password") && f.password == "":
		return usageError(cmd, "the password is empty")
	case f.stdin && f.user == "":
		return usageError(cmd, "--password-stdin needs --username")
	}
	return nil
}

// registryHost is the registry that a command is for: as users write it, with
// or without a scheme.
func registryHost(cmd *cobra.Command, args []string) (string, error) {
	if len(args) == 0 {
		return "docker.io", nil
	}
	host := strings.TrimPrefix(strings.TrimPrefix(args[0], "https://"), "http://")
	host, _, _ = strings.Cut(host, "/")
	if auth.IsHub(host) {
		return "docker.io", nil
	}
	// A name without a dot or port would be read as a user of Docker Hub.
	n, err := reference.ParseNamed(host + "/x")
	if err != nil || reference.Domain(n) != host {
		return "", usageError(cmd, "%q is not the name of a registry: HOST[:PORT]", args[0])
	}
	return host, nil
}

func (a *App) login(cmd *cobra.Command, host string, f loginFlags) error {
	if f.password != "" {
		fmt.Fprintln(a.Err, "WARNING: others on this machine can see the password of --password; use --password-stdin.")
	}
	if err := a.askCredentials(cmd, host, &f); err != nil {
		return err
	}
	client, err := registry.New(registry.Options{Insecure: f.insecure})
	if err != nil {
		return err
	}
	kept, err := client.Login(cmd.Context(), host, f.user, f.password)
	if err != nil {
		return err
	}
	if kept.Plain {
		fmt.Fprintf(a.Err, "WARNING: the password is kept in plain text in %s; a credential helper would keep it safe.\n", kept.Path)
	}
	if _, err := fmt.Fprintln(a.Out, "Login Succeeded"); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// askCredentials gets what the flags did not give from standard input.
func (a *App) askCredentials(cmd *cobra.Command, host string, f *loginFlags) error {
	if f.stdin {
		b, err := io.ReadAll(io.LimitReader(a.In, maxPassword+1))
		if err != nil {
			return fmt.Errorf("read password: %w", err)
		}
		f.password = strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
		if f.password == "" || len(b) > maxPassword {
			return usageError(cmd, "no password on standard input, or too long a one")
		}
		return nil
	}
	if f.user != "" && f.password != "" {
		return nil
	}
	in, ok := a.In.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return diag.New(diag.ExitUsage, "cannot ask for user name and password: standard input is not a terminal").
			WithHint("Use --username and --password-stdin.")
	}
	if f.user == "" {
		fmt.Fprintf(a.Err, "Username for %s: ", host)
		line, err := bufio.NewReader(in).ReadString('\n')
		if err != nil {
			return fmt.Errorf("read user name: %w", err)
		}
		if f.user = strings.TrimSpace(line); f.user == "" {
			return usageError(cmd, "the user name is empty")
		}
	}
	if f.password == "" {
		password, err := readPassword(cmd.Context(), a.Err, in)
		if err != nil {
			return err
		}
		if f.password = password; password == "" {
			return usageError(cmd, "the password is empty")
		}
	}
	return nil
}

// readPassword reads a line without showing it, and leaves the terminal as it
// was also if ctx ends meanwhile.
func readPassword(ctx context.Context, w io.Writer, in *os.File) (string, error) {
	fd := int(in.Fd())
	state, err := term.GetState(fd)
	if err != nil {
		return "", fmt.Errorf("read password: %w", err)
	}
	type answer struct {
		password []byte
		err      error
	}
	got := make(chan answer, 1)
	fmt.Fprint(w, "Password: ")
	go func() {
		b, err := term.ReadPassword(fd)
		got <- answer{b, err}
	}()
	defer fmt.Fprintln(w)
	select {
	case <-ctx.Done():
		return "", errors.Join(context.Cause(ctx), term.Restore(fd, state))
	case a := <-got:
		if a.err != nil {
			return "", fmt.Errorf("read password: %w", a.err)
		}
		return string(a.password), nil
	}
}

func newLogoutCommand(app *App) *cobra.Command {
	return &cobra.Command{
		Use:               "logout [REGISTRY]",
		Short:             "Forget the user name and password for a registry",
		Long:              "Forget the user name and password for a registry (Docker Hub if none is given)\nthat 'kiln login' or docker keep.",
		Example:           "  kiln logout registry.example",
		Args:              nargs(0, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			host, err := registryHost(cmd, args)
			if err != nil {
				return err
			}
			found, err := auth.Erase(cmd.Context(), host)
			if err != nil {
				return err
			}
			text := "Not logged in to " + host
			if found {
				text = "Removed the login for " + host
			}
			if _, err := fmt.Fprintln(app.Out, text); err != nil {
				return fmt.Errorf("write output: %w", err)
			}
			return nil
		},
	}
}

package cli

import (
	"fmt"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kiln-build/kiln/internal/build"
	"github.com/kiln-build/kiln/internal/secret"
	"github.com/kiln-build/kiln/internal/sshagent"
)

// stepFlags are the options about what RUN steps are given.
type stepFlags struct {
	Secrets []string
	SSH     []string
	Ulimits []string
	ShmSize string
}

func (f *stepFlags) define(fl *pflag.FlagSet) {
	fl.StringArrayVar(&f.Secrets, "secret", nil, "secret for RUN steps that mount it, id=ID[,src=FILE|,env=VARIABLE]")
	fl.StringArrayVar(&f.SSH, "ssh", nil, "SSH agent for RUN steps that mount it, default|ID[=SOCKET|KEYFILE[,KEYFILE]]")
	fl.StringArrayVar(&f.Ulimits, "ulimit", nil, "limit of a resource in RUN steps, NAME=SOFT[:HARD]")
	fl.StringVar(&f.ShmSize, "shm-size", "", "size of /dev/shm in RUN steps, such as 256m (default 64m)")
}

// check refuses what can be seen to be wrong without doing anything.
func (f *stepFlags) check(cmd *cobra.Command) error {
	if err := f.apply(&build.Request{}); err != nil {
		return usageError(cmd, "%w", err)
	}
	return nil
}

// apply translates the flags.
func (f *stepFlags) apply(req *build.Request) error {
	for _, v := range f.Secrets {
		s, err := secret.Parse(v)
		if err != nil {
			return fmt.Errorf("invalid --secret: %w", err) // not its text, which may be the secret itself
		}
		req.Secrets = append(req.Secrets, s)
	}
	for _, v := range f.SSH {
		s, err := sshagent.Parse(v)
		if err != nil {
			return fmt.Errorf("invalid --ssh %q: %w", v, err)
		}
		req.SSH = append(req.SSH, s)
	}
	for _, v := range f.Ulimits {
		u, err := units.ParseUlimit(v)
		if err != nil {
			return fmt.Errorf("invalid --ulimit %q: %w", v, err)
		}
		req.Ulimits = append(req.Ulimits, *u)
	}
	if f.ShmSize != "" {
		n, err := units.RAMInBytes(f.ShmSize)
		if err != nil || n <= 0 {
			return fmt.Errorf("invalid --shm-size %q: it is not a size such as 256m", f.ShmSize)
		}
		req.ShmSize = n
	}
	return nil
}

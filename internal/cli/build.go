package cli

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/kiln-build/kiln/internal/cache"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/export"
	"github.com/kiln-build/kiln/internal/frontend"
	"github.com/kiln-build/kiln/internal/progress"
	"github.com/spf13/cobra"
)

const buildLong = `Build an image from a Dockerfile and a build context: the files that COPY and ADD
can take. The context is a directory, a URL (git repository or archive), or "-" for
an archive or a Dockerfile alone on standard input.

Without --push and --output the image is kept in the local store, under the names
that --tag gives. A build that fails pushes and tags nothing.`

const buildExample = `  # Build the Dockerfile in this directory and keep the image as app:1.0
  kiln build -t app:1.0 .

  # Build another Dockerfile up to one of its stages, with a build argument
  kiln build -f deploy/Dockerfile --target test --build-arg VERSION=1.2 .

  # Push, and write the digest to a file; nothing is pushed if a step fails
  kiln build -t registry.example/team/app:1.0 --push --iidfile digest.txt .

  # Write an archive that 'docker load' takes, or the files of the image
  kiln build -o type=docker,dest=app.tar .
  kiln build -o type=local,dest=out .

  # Give a secret and an SSH agent to steps with RUN --mount=type=secret or ssh
  kiln build --secret id=npmrc,src=$HOME/.npmrc --ssh default .

  # See what would be done, and do nothing
  kiln build --print=plan .`

// buildFlags are the options of a build as they were given, each checked by
// itself.
type buildFlags struct {
	Context      string // PATH, URL or "-"
	Tags         []string
	File         string
	BuildArgs    []string // K=V, or K for the environment's value
	BuildContext []string // NAME=VALUE
	Target       string
	Labels       []string // K=V
	Platforms    []string
	NoCache      bool
	NoCacheOf    []string // stages
	CacheFrom    []string
	CacheTo      []string
	MountsFrom   []string
	MountsTo     []string
	Pull         bool
	Push         bool
	Load         bool
	Outputs      []string
	Annotations  []string // [TYPE:]K=V
	IIDFile      string
	MetadataFile string
	Progress     string
	Quiet        bool
	Debug        bool
	Network      string
	AddHosts     []string // HOST:IP or HOST=IP
	Timeout      time.Duration
	Sandbox      string
	Insecure     []string
	Compression  string
	Root         string
	StoreLimit   string
	Print        string
	Call         string
	Check        bool
	Provenance   string
	SBOM         string
	Attests      []string

	docker dockerOptions
	mode   string   // of progress
	call   call     // of Call and Check
	notes  []string // to be said of options
	stepFlags
}

// newBuildFlags defines the options of a build on cmd.
func newBuildFlags(cmd *cobra.Command) *buildFlags {
	f := &buildFlags{}
	fl := cmd.Flags()
	fl.StringArrayVarP(&f.Tags, "tag", "t", nil, "name of the image, NAME[:TAG]; may be given more than once")
	fl.StringVarP(&f.File, "file", "f", "", `Dockerfile, "-" for standard input (default PATH/Dockerfile)`)
	fl.StringArrayVar(&f.BuildArgs, "build-arg", nil, "value of an ARG, NAME=VALUE, or NAME for the environment variable's")
	fl.StringArrayVar(&f.BuildContext, "build-context", nil, "further context, NAME=PATH|URL|docker-image://REF|oci-layout://PATH")
	fl.StringVar(&f.Target, "target", "", "stage to build (default the last)")
	fl.StringArrayVar(&f.Labels, "label", nil, "label of the image, NAME=VALUE")
	fl.StringSliceVar(&f.Platforms, "platform", nil, "platform to build for, OS/ARCH[/VARIANT] (default this machine's)")
	fl.BoolVar(&f.NoCache, "no-cache", false, "run every step, use no cached result, and empty the cache mounts")
	fl.StringArrayVar(&f.NoCacheOf, "no-cache-filter", nil, "stage of which every step is run, with empty cache mounts")
	fl.StringArrayVar(&f.CacheFrom, "cache-from", nil, "cache to read, type=registry,ref=REF|type=local,src=DIR, or REF; may be given more than once")
	fl.StringArrayVar(&f.CacheTo, "cache-to", nil, "cache to write, type=registry,ref=REF|type=local,dest=DIR|type=inline[,mode=min|max]")
	fl.StringArrayVar(&f.MountsFrom, "cache-mounts-from", nil, "cache to take cache mounts from that the store does not have, as --cache-from")
	fl.StringArrayVar(&f.MountsTo, "cache-mounts-to", nil, "cache to write the cache mounts to that steps used, as --cache-to")
	fl.BoolVar(&f.Pull, "pull", false, "ask registries for base images even if the store has them")
	fl.BoolVar(&f.Push, "push", false, "push the image under each of its names (short for --output=type=registry)")
	fl.BoolVar(&f.Load, "load", false, "keep the image in the local store (short for --output=type=docker, and what happens without any)")
	fl.StringArrayVarP(&f.Outputs, "output", "o", nil, "type=registry|image|oci|docker|tar|local[,dest=PATH]; or a directory, or \"-\" for a tar")
	fl.StringArrayVar(&f.Annotations, "annotation", nil, "annotation of the image, [TYPE[[PLATFORM]]:]KEY=VALUE, where TYPE is manifest, index, manifest-descriptor or index-descriptor")
	fl.StringVar(&f.IIDFile, "iidfile", "", "write the image's ID to this file")
	fl.StringVar(&f.MetadataFile, "metadata-file", "", "write what is known of the result to this file, as JSON")
	fl.StringVar(&f.Progress, "progress", "auto", "how to show progress: "+strings.Join(progress.Modes(), ", "))
	fl.BoolVarP(&f.Quiet, "quiet", "q", false, "show no progress, print the image's ID")
	fl.BoolVarP(&f.Debug, "debug", "D", false, "show warnings with the lines that they are about and what they mean")
	fl.StringVar(&f.Network, "network", "default", "network of RUN steps: default, host (the same here) or none")
	fl.StringArrayVar(&f.AddHosts, "add-host", nil, "entry of /etc/hosts in RUN steps, HOST:IP")
	f.stepFlags.define(fl)
	fl.DurationVar(&f.Timeout, "timeout", 0, "give up after this time, such as 30m (default never)")
	fl.StringVar(&f.Sandbox, "sandbox", "auto", "what runs RUN steps: auto or gvisor ('kiln info' shows what auto takes)")
	fl.StringArrayVar(&f.Insecure, "insecure-registry", nil, insecureHelp)
	fl.StringVar(&f.Compression, "compression", "gzip", "compression of new layers: gzip or zstd")
	fl.StringVar(&f.StoreLimit, "store-limit", "", "how large the store may be after the build, 20GB, 60% of its disk or none (default $KILN_STORE_LIMIT, or 80% up to 100GB, with 20% of the disk free)")
	fl.StringVar(&f.Root, "root", "", "directory of the local store (default $KILN_ROOT, or kiln in the user's data directory)")
	fl.StringVar(&f.Print, "print", "", "print instead of building: plan")
	fl.StringVar(&f.Call, "call", "build", "ask about the Dockerfile instead of building: check, outline, targets[,format=json]")
	fl.BoolVar(&f.Check, "check", false, "look for what is better not done so in the Dockerfile (short for --call=check)")
	fl.StringVar(&f.Provenance, "provenance", "", "whether there is to be a provenance attestation: false")
	fl.StringVar(&f.SBOM, "sbom", "", "whether there is to be an SBOM: false")
	fl.StringArrayVar(&f.Attests, "attest", nil, "attestation, type=TYPE,disabled=true")
	f.docker = newDockerOptions(cmd)
	for name, values := range map[string][]string{
		"progress": progress.Modes(), "network": {"default", "host", "none"}, "sandbox": {"auto", "gvisor"},
		"compression": {"gzip", "zstd"}, "print": {"plan"}, "call": {"build", "check", "outline", "targets"},
	} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	return f
}

const insecureHelp = "registry HOST[:PORT] that may be spoken to by plain HTTP or with a certificate that nobody vouches for"

// check refuses what can be seen to be wrong without doing anything.
func (f *buildFlags) check(cmd *cobra.Command) error {
	for _, c := range []struct {
		flag, value string
		allowed     []string
	}{
		{"progress", f.Progress, progress.Modes()},
		{"network", f.Network, []string{"default", "host", "none"}},
		{"sandbox", f.Sandbox, []string{"auto", "gvisor"}},
		{"compression", f.Compression, []string{"gzip", "zstd"}},
		{"print", f.Print, []string{"", "plan"}},
	} {
		if err := oneOf(cmd, c.flag, c.value, c.allowed); err != nil {
			return err
		}
	}
	if err := f.checkLists(cmd); err != nil {
		return err
	}
	if err := checkAttestations(f.Provenance, f.SBOM, f.Attests); err != nil {
		return err
	}
	var err error
	if f.notes, err = f.docker.check(); err != nil {
		return err
	}
	if f.call, err = parseCall(f.Call); err != nil {
		return err
	}
	if f.Check {
		f.call.question = frontend.Lint
	}
	if err := f.stepFlags.check(cmd); err != nil {
		return err
	}
	switch {
	case f.Timeout < 0:
		return usageError(cmd, "invalid --timeout %q: it is negative", f.Timeout)
	case f.Push && len(f.Tags) == 0:
		return usageError(cmd, "--push needs a name to push to").WithHint("Give the image a name with --tag REGISTRY/NAME[:TAG].")
	case f.Context == "-" && f.File == "-":
		return usageError(cmd, "the context and the Dockerfile cannot both come from standard input")
	case f.NoCache && len(f.NoCacheOf) > 0:
		return usageError(cmd, "--no-cache and --no-cache-filter contradict each other")
	case f.IIDFile != "" && slices.ContainsFunc(f.Outputs, filesAlone):
		return usageError(cmd, "--iidfile: an output that is files alone has no ID")
	case f.Quiet && cmd.Flags().Changed("progress") && f.Progress != "quiet":
		return usageError(cmd, "--quiet and --progress=%s contradict each other", f.Progress)
	}
	return nil
}

func (f *buildFlags) checkLists(cmd *cobra.Command) error {
	for _, c := range [][2][]string{{f.CacheFrom, f.CacheTo}, {f.MountsFrom, f.MountsTo}} {
		if _, _, err := caches(c[0], c[1]); err != nil {
			return err
		}
	}
	for _, t := range f.Tags {
		if _, err := taggable(t); err != nil {
			return err
		}
	}
	for _, p := range f.Platforms {
		if _, err := platforms.Parse(p); err != nil && p != "local" {
			return usageError(cmd, "invalid --platform %q: %w", p, err)
		}
	}
	for _, a := range f.BuildArgs {
		if name, _, _ := strings.Cut(a, "="); name == "" {
			return usageError(cmd, "invalid --build-arg %q: it has no name", a)
		}
	}
	for _, l := range f.Labels {
		if name, _, _ := strings.Cut(l, "="); name == "" {
			return usageError(cmd, "invalid --label %q: it has no name", l)
		}
	}
	for _, c := range f.BuildContext {
		if name, value, _ := strings.Cut(c, "="); name == "" || value == "" {
			return usageError(cmd, "invalid --build-context %q: it is not of the form NAME=VALUE", c)
		}
	}
	for _, h := range f.AddHosts {
		if _, _, err := parseHost(h); err != nil {
			return usageError(cmd, "invalid --add-host %q: %w", h, err)
		}
	}
	return nil
}

// filesAlone reports whether an --output is no image. What is wrong with it is said later.
func filesAlone(output string) bool {
	sp, err := export.ParseSpec(output)
	return err == nil && sp.Files()
}

// caches are those that are to be read and written.
func caches(froms, tos []string) (from, to []cache.Spec, err error) {
	for _, s := range froms {
		specs, err := cache.ParseFrom(s)
		if err != nil {
			return nil, nil, err
		}
		from = append(from, specs...)
	}
	for _, s := range tos {
		spec, err := cache.ParseTo(s)
		if err != nil {
			return nil, nil, err
		}
		to = append(to, spec)
	}
	return from, to, nil
}

func oneOf(cmd *cobra.Command, flag, value string, allowed []string) error {
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	return usageError(cmd, "invalid --%s %q: use one of %s", flag, value, strings.Join(allowed, ", "))
}

// parseHost reads HOST:IP or HOST=IP; an IPv6 address may be in brackets.
func parseHost(s string) (host string, ip netip.Addr, err error) {
	i := strings.IndexAny(s, ":=")
	if i <= 0 {
		return "", ip, errNotHostIP
	}
	addr := s[i+1:]
	if strings.HasPrefix(addr, "[") && strings.HasSuffix(addr, "]") {
		addr = addr[1 : len(addr)-1]
	}
	ip, err = netip.ParseAddr(addr)
	if err != nil {
		return "", ip, errNotHostIP
	}
	return s[:i], ip, nil
}

var errNotHostIP = diag.New(diag.ExitUsage, "it is not of the form HOST:IP")

func newBuildCommand(app *App) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "build [OPTIONS] PATH|URL|-",
		Short:   "Build an image from a Dockerfile",
		Long:    buildLong,
		Example: buildExample,
		Args:    nargs(1, 1),
	}
	f := newBuildFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		f.Context = args[0]
		if err := f.check(cmd); err != nil {
			return err
		}
		return app.build(cmd.Context(), f)
	}
	return cmd
}

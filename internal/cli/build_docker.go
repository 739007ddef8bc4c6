package cli

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kiln-build/kiln/internal/diag"
)

// dockerFlag is an option of docker's and buildx's builds that has no meaning here:
// it is taken, and said to have none, if the image is the same without it, else refused.
type dockerFlag struct {
	name, short string
	bare        bool     // may be given without a value, which then is "true"
	harmless    []string // values that are taken; nil: all
	note        string   // why what is taken has no meaning; empty: nothing is said
	refuse      string   // why what is not taken is refused
	hint        string
}

const (
	noteBuilder = "there is one builder, this program"
	noteRemove  = "steps leave no containers behind"
	noteLimit   = "steps have the builder's limits: set them on its pod, or with systemd-run"
)

// dockerFlags are all of them; docs/compatibility.md lists them.
func dockerFlags() []dockerFlag {
	return []dockerFlag{
		{name: "builder", note: noteBuilder},
		{name: "rm", bare: true, harmless: []string{"true"}},
		{name: "rm", bare: true, note: noteRemove},
		{name: "force-rm", bare: true, note: noteRemove},
		{name: "memory", short: "m", note: noteLimit},
		{name: "memory-swap", note: noteLimit},
		{name: "cpu-shares", short: "c", note: noteLimit},
		{name: "cpu-period", note: noteLimit},
		{name: "cpu-quota", note: noteLimit},
		{name: "cpuset-cpus", note: noteLimit},
		{name: "cpuset-mems", note: noteLimit},
		{name: "compress", bare: true, note: "the context is read where it lies, and sent nowhere"},
		{name: "isolation", harmless: []string{"", "default"}, refuse: "RUN steps run in a sandbox of their own", hint: "Leave --isolation out."},
		{
			name: "disable-content-trust", bare: true, harmless: []string{"true"},
			refuse: "signatures of base images are not verified", hint: "Name base images by digest: FROM NAME@sha256:….",
		},
		{
			name: "allow", harmless: []string{"network.host"},
			refuse: "it is not granted: steps have no privilege, and nothing is deleted", hint: "--allow network.host is taken.",
		},
		{
			name: "squash", bare: true, harmless: []string{"false"},
			refuse: "layers are not squashed",
			hint:   "Copy the finished files into a last stage, which makes one layer: FROM scratch, COPY --from=build / /.",
		},
		{
			name: "security-opt", harmless: []string{},
			refuse: "a step's sandbox has no such options", hint: "It needs none: steps have neither the builder's privileges nor its kernel.",
		},
		{
			name: "resource", harmless: []string{},
			refuse: "single steps have no limits", hint: "Set limits of memory and CPU on the builder: on its pod, or with systemd-run.",
		},
		{name: "policy", harmless: []string{"disabled=true"}, refuse: "policies of sources are not supported", hint: "Name base images by digest."},
	}
}

// dockerValue notes the values that an option was given.
type dockerValue struct{ given *[]string }

func (dockerValue) String() string { return "" }
func (dockerValue) Type() string   { return "string" }

// Set notes a value. It refuses none: that would be another error than ours.
func (v dockerValue) Set(s string) error {
	*v.given = append(*v.given, s)
	return nil
}

// dockerOptions are those that a command line has.
type dockerOptions map[string]*[]string

// newDockerOptions defines the options on cmd, hidden.
func newDockerOptions(cmd *cobra.Command) dockerOptions {
	o := dockerOptions{}
	for _, d := range dockerFlags() {
		if o[d.name] != nil {
			continue
		}
		o[d.name] = &[]string{}
		fl := cmd.Flags().VarPF(dockerValue{o[d.name]}, d.name, d.short, "docker's")
		fl.Hidden = true
		if d.bare {
			fl.NoOptDefVal = "true"
		}
	}
	return o
}

// check refuses what the build would have to do, and returns what is to be
// said of the rest.
func (o dockerOptions) check() (notes []string, err error) {
	said := map[string][]string{} // by why
	for name, values := range o {
		for _, v := range *values {
			note, err := o.value(name, v)
			if err != nil {
				return nil, err
			}
			if note != "" && !slices.Contains(said[note], "--"+name) {
				said[note] = append(said[note], "--"+name)
			}
		}
	}
	for why, names := range said {
		slices.Sort(names)
		has := "has"
		if len(names) > 1 {
			has = "have"
		}
		notes = append(notes, fmt.Sprintf("%s %s no meaning here: %s", strings.Join(names, ", "), has, why))
	}
	slices.Sort(notes)
	return notes, nil
}

// value is what is to be said of one value, or why it is refused.
func (dockerOptions) value(name, value string) (note string, err error) {
	given := value
	if b, err := strconv.ParseBool(value); err == nil {
		given = strconv.FormatBool(b)
	}
	var d dockerFlag
	for _, d = range dockerFlags() {
		if d.name == name && (d.harmless == nil || slices.Contains(d.harmless, given)) {
			return d.note, nil
		}
	}
	for _, d = range dockerFlags() {
		if d.name == name {
			break
		}
	}
	return "", diag.New(diag.ExitUsage, "--%s=%s is not supported: %s", name, value, d.refuse).WithHint("%s", d.hint)
}

// checkAttestations refuses --provenance, --sbom and --attest unless they say that there
// are to be none.
func checkAttestations(provenance, sbom string, attests []string) error {
	for _, a := range attests {
		kind, off := "", false
		for f := range strings.SplitSeq(a, ",") {
			k, v, _ := strings.Cut(f, "=")
			switch strings.ToLower(strings.TrimSpace(k)) {
			case "type":
				kind = v
			case "disabled":
				off, _ = strconv.ParseBool(v)
			}
		}
		if !off {
			return attestation("attest", a, kind)
		}
	}
	for flag, v := range map[string]string{"provenance": provenance, "sbom": sbom} {
		if on, err := strconv.ParseBool(v); v != "" && (err != nil || on) {
			return attestation(flag, v, flag)
		}
	}
	return nil
}

func attestation(flag, value, kind string) error {
	hint := "Leave it out, or say --provenance=false --sbom=false."
	if kind != "provenance" && kind != "sbom" {
		hint = "Types are provenance and sbom."
	}
	return diag.New(diag.ExitUsage, "--%s=%s is not supported: attestations about the image are not made yet", flag, value).WithHint("%s", hint)
}

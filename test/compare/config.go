package compare

import (
	"encoding/json"
	"fmt"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// configs compares every field that says how the image is run and made, but
// for times, the builder's name and the digests that follow from the layers.
func (r *Report) configs(a, b *v1.ConfigFile, meaning bool) {
	if meaning {
		a, b = plain(a), plain(b)
	}
	fa, fb := fields(a), fields(b)
	for _, k := range paths(fa, fb) {
		r.add("config: "+k, or(fa[k], "none"), or(fb[k], "none"))
	}
}

// plain is a config without the choices that make no difference to a container:
// the order of the environment, / as no working directory, the host name of
// docker's builds, and ArgsEscaped, which is for Windows.
func plain(c *v1.ConfigFile) *v1.ConfigFile {
	c = c.DeepCopy()
	slices.Sort(c.Config.Env)
	if c.Config.WorkingDir == "/" {
		c.Config.WorkingDir = ""
	}
	c.Config.Hostname = ""
	c.Config.ArgsEscaped = false //nolint:staticcheck // deprecated, and written nevertheless
	return c
}

// history compares what the steps are called and which of them have a layer.
func (r *Report) history(a, b *v1.ConfigFile) {
	r.add("history: entries", fmt.Sprint(len(a.History)), fmt.Sprint(len(b.History)))
	for i := range min(len(a.History), len(b.History)) {
		ha, hb := a.History[i], b.History[i]
		at := fmt.Sprintf("history %d: ", i)
		r.add(at+"created_by", fmt.Sprintf("%q", ha.CreatedBy), fmt.Sprintf("%q", hb.CreatedBy))
		r.add(at+"empty_layer", fmt.Sprint(ha.EmptyLayer), fmt.Sprint(hb.EmptyLayer))
		r.add(at+"comment", fmt.Sprintf("%q", ha.Comment), fmt.Sprintf("%q", hb.Comment))
		r.add(at+"author", fmt.Sprintf("%q", ha.Author), fmt.Sprintf("%q", hb.Author))
	}
}

func fields(c *v1.ConfigFile) map[string]string {
	m := map[string]string{}
	set := func(name string, v any) {
		b, err := json.Marshal(v)
		if err != nil {
			b = []byte(fmt.Sprintf("%v", v))
		}
		switch s := string(b); s {
		case `null`, `""`, `[]`, `{}`, `false`:
		default:
			m[name] = s
		}
	}
	set("architecture", c.Architecture)
	set("variant", c.Variant)
	set("os", c.OS)
	set("os.version", c.OSVersion)
	set("author", c.Author)
	x := c.Config
	set("Env", x.Env)
	set("Cmd", x.Cmd)
	set("Entrypoint", x.Entrypoint)
	set("WorkingDir", x.WorkingDir)
	set("User", x.User)
	set("ExposedPorts", x.ExposedPorts)
	set("Volumes", x.Volumes)
	set("Labels", x.Labels)
	set("Healthcheck", x.Healthcheck)
	set("StopSignal", x.StopSignal)
	set("Shell", x.Shell)
	set("OnBuild", x.OnBuild)
	set("ArgsEscaped", x.ArgsEscaped)
	set("Hostname", x.Hostname)
	set("Domainname", x.Domainname)
	set("NetworkDisabled", x.NetworkDisabled)
	set("MacAddress", x.MacAddress)
	return m
}

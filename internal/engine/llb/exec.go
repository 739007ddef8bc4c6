package llb

import (
	"errors"
	"fmt"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/buildkit/solver/pb"

	"github.com/kiln-build/kiln/internal/engine"
)

func exec(e *pb.ExecOp, raw *pb.Op, op *engine.Op) (engine.Operation, error) {
	m := e.GetMeta()
	if m == nil || len(m.Args) == 0 {
		return nil, errors.New("a RUN step without a command")
	}
	name(op, "RUN "+strings.Join(m.Args, " "))
	if err := supported(e); err != nil {
		return nil, err
	}
	x := &engine.Exec{
		Args: m.Args, Env: m.Env, Cwd: m.Cwd, User: m.User, Hostname: m.Hostname,
		NoNetwork: e.Network == pb.NetMode_NONE, Platform: platform(raw.Platform), Proxy: proxy(m.ProxyEnv),
	}
	if x.Cwd == "" {
		x.Cwd = "/"
	}
	for _, h := range m.ExtraHosts {
		x.Hosts = append(x.Hosts, engine.Host{Name: h.GetHost(), IP: h.GetIP()})
	}
	for _, c := range m.ValidExitCodes {
		x.Success = append(x.Success, int(c))
	}
	var err error
	if x.Ulimits, err = ulimits(m.Ulimit); err != nil {
		return nil, err
	}
	if x.SecretEnv, err = secretEnv(e.Secretenv); err != nil {
		return nil, err
	}
	return x, mounts(e, op, x)
}

// supported refuses, by the name that it has in a Dockerfile, what the engine cannot do. A
// control group (--cgroup-parent) bounds what a step may use, not what comes of it, and steps have none.
func supported(e *pb.ExecOp) error {
	if e.Security == pb.SecurityMode_INSECURE {
		return errors.New("RUN --security=insecure is not supported: the sandbox has no privilege of the machine's to give, " +
			"so that nothing which needs it would work")
	}
	if len(e.CdiDevices) > 0 {
		return errors.New("RUN --device is not supported")
	}
	if _, ok := pb.NetMode_name[int32(e.Network)]; !ok {
		return fmt.Errorf("a RUN step with network mode %d, which is not known", e.Network)
	}
	return nil
}

func ulimits(us []*pb.Ulimit) ([]engine.Ulimit, error) {
	var out []engine.Ulimit
	for _, u := range us {
		// -1 is no limit at all, in Linux too.
		l, err := (&units.Ulimit{Name: u.GetName(), Soft: u.GetSoft(), Hard: u.GetHard()}).GetRlimit()
		if err == nil && l.Soft > l.Hard {
			err = fmt.Errorf("the soft limit of %s, %d, is above the hard one, %d", u.GetName(), u.GetSoft(), u.GetHard())
		}
		if err != nil {
			return nil, fmt.Errorf("--ulimit: %w", err)
		}
		out = append(out, engine.Ulimit{Resource: l.Type, Soft: l.Soft, Hard: l.Hard})
	}
	return out, nil
}

func secretEnv(es []*pb.SecretEnv) ([]engine.SecretEnv, error) {
	var out []engine.SecretEnv
	for _, e := range es {
		if e.GetID() == "" || e.GetName() == "" {
			return nil, errors.New("RUN --mount=type=secret,env=… without an id or name")
		}
		out = append(out, engine.SecretEnv{Name: e.Name, ID: e.ID, Optional: e.Optional})
	}
	return out, nil
}

func proxy(p *pb.ProxyEnv) (env []string) {
	if p == nil {
		return nil
	}
	for _, kv := range []struct{ k, v string }{
		{"HTTP_PROXY", p.HttpProxy},
		{"HTTPS_PROXY", p.HttpsProxy},
		{"FTP_PROXY", p.FtpProxy},
		{"NO_PROXY", p.NoProxy},
		{"ALL_PROXY", p.AllProxy},
	} {
		if kv.v != "" {
			env = append(env, kv.k+"="+kv.v, strings.ToLower(kv.k)+"="+kv.v)
		}
	}
	return env
}

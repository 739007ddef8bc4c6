package llb

import (
	"errors"
	"strings"

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
	mounts, err := mounts(e, op)
	if err != nil {
		return nil, err
	}
	x := &engine.Exec{
		Args: m.Args, Env: m.Env, Cwd: m.Cwd, User: m.User, Hostname: m.Hostname,
		NoNetwork: e.Network == pb.NetMode_NONE, Platform: platform(raw.Platform), Proxy: proxy(m.ProxyEnv), Mounts: mounts,
	}
	if x.Cwd == "" {
		x.Cwd = "/"
	}
	for _, h := range m.ExtraHosts {
		x.Hosts = append(x.Hosts, engine.Host{Name: h.GetHost(), IP: h.GetIP()})
	}
	return x, nil
}

// supported refuses, by the name that it has in a Dockerfile, what the engine cannot do.
func supported(e *pb.ExecOp) error {
	if e.Security == pb.SecurityMode_INSECURE {
		return errors.New("RUN --security=insecure is not supported: there is no privilege to give")
	}
	if len(e.CdiDevices) > 0 {
		return errors.New("RUN --device is not supported")
	}
	if len(e.Secretenv) > 0 {
		return errors.New("RUN --mount=type=secret,env=… is not supported yet")
	}
	if len(e.Meta.ValidExitCodes) > 0 {
		return errors.New("steps with other exit codes than 0 for success are not supported")
	}
	if len(e.Meta.Ulimit) > 0 {
		return errors.New("--ulimit is not supported yet")
	}
	if e.Meta.CgroupParent != "" {
		return errors.New("--cgroup-parent is not supported: steps have no control group of their own")
	}
	return nil
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

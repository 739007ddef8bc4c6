package auth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/docker/docker-credential-helpers/credentials"
	"github.com/kiln-build/kiln/internal/diag"
	"github.com/kiln-build/kiln/internal/registry/auth/ecr"
)

// Store keeps a user's password for a host in docker's config.json, or in the
// helper which that names, and returns where: the path of the file or the name
// of the helper, and whether it lies there in plain text.
func Store(ctx context.Context, host, user, password string) (where string, plain bool, err error) {
	path, cf, err := dockerConfig()
	if err != nil {
		return "", false, err
	}
	key := storeKey(host)
	helper, from := cf.helperFor(key)
	if isBuiltIn(helper) {
		if ecr.IsRegistry(key) {
			return "", false, diag.New(diag.ExitUsage, "log in to %q: its passwords come from AWS credentials (%s, built in, named by %s)", host, helper, from).
				WithHint("There is nothing to log in to: builds get a password by themselves.")
		}
		helper = "" // it keeps nothing: the file does
	}
	if helper != "" {
		err := runHelper(ctx, helper, from, func(p client.ProgramFunc) error {
			return client.Store(p, &credentials.Credentials{ServerURL: key, Username: user, Secret: password})
		})
		if err != nil {
			return "", false, err
		}
		// As docker does: the entry says that there is a login, without its secret.
		return "docker-credential-" + helper, false, edit(path, setAuth(key, struct{}{}))
	}
	entry := map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password))}
	return path, true, edit(path, setAuth(key, entry))
}

// Erase removes what Store kept for host; found is false if there was nothing.
func Erase(ctx context.Context, host string) (found bool, err error) {
	path, cf, err := dockerConfig()
	if err != nil {
		return false, err
	}
	key := storeKey(host)
	if helper, from := cf.helperFor(key); helper != "" && !isBuiltIn(helper) {
		c, err := helperGet(ctx, helper, key, from)
		if err != nil {
			return false, err
		}
		if c != nil {
			found = true
			err = runHelper(ctx, helper, from, func(p client.ProgramFunc) error { return client.Erase(p, key) })
			if err != nil {
				return false, err
			}
		}
	}
	var drop []string
	for k := range cf.Auths {
		if k == key || legacyHost(k) == host || IsHub(host) && IsHub(legacyHost(k)) {
			drop = append(drop, k)
		}
	}
	if len(drop) == 0 {
		return found, nil
	}
	return true, edit(path, func(auths map[string]json.RawMessage) error {
		for _, k := range drop {
			delete(auths, k)
		}
		return nil
	})
}

func (cf *configFile) helperFor(key string) (suffix, from string) {
	keys := []string{key}
	if key == HubKey {
		keys = append(keys, "docker.io", "index.docker.io")
	}
	for _, k := range keys {
		if h := cf.CredHelpers[k]; h != "" {
			return h, "credHelpers in " + cf.source
		}
	}
	return cf.CredsStore, "credsStore in " + cf.source
}

func storeKey(host string) string {
	if IsHub(host) {
		return HubKey
	}
	return host
}

// dockerConfig is the file that docker login writes, and what it has now.
func dockerConfig() (string, *configFile, error) {
	dir := dockerDir()
	if dir == "" {
		return "", nil, diag.New(diag.ExitFailure, "find docker's config: this user has no home").WithHint("Set DOCKER_CONFIG or HOME.")
	}
	path := filepath.Join(dir, "config.json")
	cf, err := load(path)
	return path, cf, err
}

func setAuth(key string, entry any) func(map[string]json.RawMessage) error {
	return func(auths map[string]json.RawMessage) error {
		raw, err := json.Marshal(entry)
		auths[key] = raw
		return err
	}
}

// edit changes the auths of a config file and nothing else in it: fields that
// are not known here stay. The file is replaced in one step, readable by its
// owner alone.
func edit(path string, change func(auths map[string]json.RawMessage) error) error {
	fail := func(err error) error {
		return diag.New(diag.ExitFailure, "write registry credentials: %w", err).
			WithHint("Set DOCKER_CONFIG to a directory that can be written.")
	}
	whole, auths := map[string]json.RawMessage{}, map[string]json.RawMessage{}
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fail(err)
	}
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &whole); err != nil {
			return fail(fmt.Errorf("%s is not a JSON object", path))
		}
	}
	if len(whole["auths"]) > 0 {
		if err := json.Unmarshal(whole["auths"], &auths); err != nil {
			return fail(fmt.Errorf("auths in %s is not a JSON object", path))
		}
	}
	if auths == nil { // "auths": null
		auths = map[string]json.RawMessage{}
	}
	if err := change(auths); err != nil {
		return fail(err)
	}
	if whole["auths"], err = json.Marshal(auths); err != nil {
		return fail(err)
	}
	out, err := json.MarshalIndent(whole, "", "\t")
	if err != nil {
		return fail(err)
	}
	if err := replaceFile(path, append(out, '\n')); err != nil {
		return fail(err)
	}
	return nil
}

// replaceFile writes beside path and renames. If path is a symbolic link, the
// file it leads to is replaced and the link stays.
func replaceFile(path string, content []byte) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".config.json.*") // 0600
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

package auth

// proxies are what docker's config says of the proxies of builds.
type proxies struct {
	HTTP  string `json:"httpProxy"`
	HTTPS string `json:"httpsProxy"`
	FTP   string `json:"ftpProxy"`
	No    string `json:"noProxy"`
	All   string `json:"allProxy"`
}

// Proxies returns the build arguments that docker's config asks for, under
// "proxies", "default": HTTP_PROXY and its like, in both cases. They are what
// RUN steps get unless the user says otherwise; the builder's own environment
// is nobody's but its own, as it is with docker. Without a config there are none.
func Proxies() (map[string]string, error) {
	path, cf, err := dockerConfig()
	if path == "" {
		return nil, nil // no home: no config
	}
	if err != nil {
		return nil, err
	}
	p := cf.Proxies["default"]
	args := map[string]string{}
	for _, v := range []struct{ upper, lower, value string }{
		{"HTTP_PROXY", "http_proxy", p.HTTP},
		{"HTTPS_PROXY", "https_proxy", p.HTTPS},
		{"FTP_PROXY", "ftp_proxy", p.FTP},
		{"NO_PROXY", "no_proxy", p.No},
		{"ALL_PROXY", "all_proxy", p.All},
	} {
		if v.value != "" {
			args[v.upper], args[v.lower] = v.value, v.value
		}
	}
	return args, nil
}

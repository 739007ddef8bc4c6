// Package ecr gets passwords for Amazon's registries, ECR and its public one,
// from AWS credentials: what docker-credential-ecr-login does, without that
// program. It is the one package that knows AWS.
//
// The credentials are looked for where AWS' own programs look, in their order (see
// chain). Nothing is written anywhere; a password, which is good for twelve hours,
// is kept in memory. No secret is in an error.
package ecr

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// timeout is for a whole login: up to two roles, and the token itself.
	timeout = 30 * time.Second
	// early is how long before its end a password is not used any more.
	early = time.Minute
)

// Password is what a registry takes for a login.
type Password struct {
	User, Secret string
	// Source says where the AWS credentials behind it come from.
	Source string
	// Expires is the end of its life.
	Expires time.Time
}

// Login gets passwords. Safe for concurrent use.
type Login struct {
	api   *http.Client // AWS' services, by way of proxies
	local *http.Client // what is on this machine or link, never by way of a proxy

	turn *semaphore.Weighted // guards what follows, and lets one ask at a time
	got  map[string]Password // by host
	none error               // there were no credentials, at
	when time.Time
}

// New returns a Login for this process's environment. It opens no connection.
func New() *Login {
	return &Login{api: apiClient(), local: localClient(), turn: semaphore.NewWeighted(1), got: map[string]Password{}}
}

// IsRegistry reports whether a host, without a port, is one of Amazon's registries.
func IsRegistry(host string) bool {
	_, ok := parseHost(host)
	return ok
}

// Public reports whether a host is Amazon's public registry, which needs no
// password for pulling.
func Public(host string) bool {
	r, ok := parseHost(host)
	return ok && r.public
}

// Password returns one for the registry at host. An error of type *NoneError says
// that there are no AWS credentials at all.
func (l *Login) Password(ctx context.Context, host string) (Password, error) {
	r, ok := parseHost(host)
	if !ok {
		return Password{}, fmt.Errorf("%q is not a registry of Amazon", host)
	}
	if err := l.turn.Acquire(ctx, 1); err != nil {
		return Password{}, context.Cause(ctx)
	}
	defer l.turn.Release(1)
	if p, ok := l.got[host]; ok && time.Until(p.Expires) > early {
		return p, nil
	}
	if l.none != nil && time.Since(l.when) < time.Minute {
		return Password{}, l.none // waiting for a metadata service takes seconds
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("AWS gives no answer within %s", timeout))
	defer cancel()
	p, err := l.ask(ctx, r)
	if ctx.Err() != nil {
		return Password{}, context.Cause(ctx)
	}
	if err == nil {
		l.got[host] = p
	}
	var none *NoneError
	if errors.As(err, &none) {
		l.none, l.when = err, time.Now()
	}
	return p, err
}

// registry is one of Amazon's.
type registry struct {
	region string
	fips   bool
	dual   bool // of the names that have IPv6 addresses
	public bool
}

// parseHost takes ACCOUNT.dkr.ecr.REGION.amazonaws.com and the like: other
// partitions, FIPS, dual stack (ACCOUNT.dkr-ecr.REGION.on.aws).
func parseHost(host string) (registry, bool) {
	const public = "us-east-1" // where all of the public registry is
	switch host {
	case "public.ecr.aws":
		return registry{region: public, public: true}, true
	case "ecr-public.aws.com":
		return registry{region: public, public: true, dual: true}, true
	}
	m := regexp.MustCompile(`^\d{12}\.dkr[.-]ecr(-fips)?\.([a-z0-9-]{1,40})\.(.+)$`).FindStringSubmatch(host)
	if m == nil {
		return registry{}, false
	}
	r := registry{region: m[2], fips: m[1] != ""}
	domain, dual := domains(r.region)
	switch m[3] {
	case domain:
		return r, true
	case strings.Replace(dual, "api.", "on.", 1): // on.aws, and api.aws for the API
		r.dual = true
		return r, true
	}
	return registry{}, false
}

// domains are those of a region's services, and of those with IPv6 addresses.
func domains(region string) (domain, dual string) {
	for _, p := range [][3]string{
		{"cn-", "amazonaws.com.cn", "api.amazonwebservices.com.cn"},
		{"us-isob-", "sc2s.sgov.gov", "api.aws.scloud"},
		{"us-isof-", "csp.hci.ic.gov", "api.aws.hci.ic.gov"},
		{"us-iso-", "c2s.ic.gov", "api.aws.ic.gov"},
		{"eu-isoe-", "cloud.adc-e.uk", "api.cloud-aws.adc-e.uk"},
		{"eusc-", "amazonaws.eu", "api.amazonwebservices.eu"},
	} {
		if strings.HasPrefix(region, p[0]) {
			return p[1], p[2]
		}
	}
	return "amazonaws.com", "api.aws"
}

// endpoint is the base URL of the registry's API.
func (r registry) endpoint() string {
	variable := "AWS_ENDPOINT_URL_ECR"
	if r.public {
		variable = "AWS_ENDPOINT_URL_ECR_PUBLIC"
	}
	if u := configured(variable); u != "" {
		return u
	}
	domain, dual := domains(r.region)
	switch {
	case r.public && r.dual:
		return "https://ecr-public." + r.region + "." + dual
	case r.public:
		return "https://api.ecr-public." + r.region + "." + domain
	case r.fips && r.dual:
		return "https://ecr-fips." + r.region + "." + dual
	case r.fips:
		return "https://ecr-fips." + r.region + "." + domain
	case r.dual:
		return "https://ecr." + r.region + "." + dual
	}
	return "https://api.ecr." + r.region + "." + domain
}

// configured is the endpoint that the environment has for a service, as for AWS' own programs.
func configured(variable string) string {
	if strings.EqualFold(os.Getenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"), "true") {
		return ""
	}
	if u := os.Getenv(variable); u != "" {
		return strings.TrimSuffix(u, "/")
	}
	return strings.TrimSuffix(os.Getenv("AWS_ENDPOINT_URL"), "/")
}

// ask gets AWS credentials and with them a password: one call, GetAuthorizationToken.
func (l *Login) ask(ctx context.Context, r registry) (Password, error) {
	creds, source, err := newChain(l, r.region).find(ctx)
	if err != nil {
		return Password{}, err
	}
	c := call{
		name: "ecr:GetAuthorizationToken", service: "ecr", region: r.region, url: r.endpoint() + "/", body: "{}", creds: &creds,
		header: map[string]string{
			"Content-Type": "application/x-amz-json-1.1",
			"X-Amz-Target": "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken",
		},
	}
	if r.public {
		c.name, c.service = "ecr-public:GetAuthorizationToken", "ecr-public"
		c.header["X-Amz-Target"] = "SpencerFrontendService.GetAuthorizationToken"
	}
	answer, err := l.do(ctx, c)
	if err != nil {
		return Password{}, fmt.Errorf("with AWS credentials from %s: %w", source, err)
	}
	p, err := readPassword(answer)
	if err != nil {
		return Password{}, fmt.Errorf("%s at %s: %w", c.name, host(c.url), err)
	}
	p.Source = source
	return p, nil
}

// readPassword takes the answer of both registries: one has a list of tokens.
func readPassword(answer []byte) (Password, error) {
	type token struct {
		Token   string  `json:"authorizationToken"`
		Expires float64 `json:"expiresAt"` // seconds since 1970
	}
	var a struct {
		Data json.RawMessage `json:"authorizationData"`
	}
	var one token
	var list []token
	if json.Unmarshal(answer, &a) != nil {
		return Password{}, errors.New("the answer is not JSON")
	}
	if json.Unmarshal(a.Data, &list) == nil && len(list) > 0 {
		one = list[0]
	} else if json.Unmarshal(a.Data, &one) != nil {
		return Password{}, errors.New("the answer has no token")
	}
	raw, err := base64.StdEncoding.DecodeString(one.Token)
	user, secret, ok := strings.Cut(string(raw), ":")
	if err != nil || !ok || user == "" || secret == "" {
		return Password{}, errors.New("the answer's token is not USER:PASSWORD in base64")
	}
	p := Password{User: user, Secret: secret, Expires: time.Unix(int64(one.Expires), 0)}
	if one.Expires == 0 {
		p.Expires = time.Now().Add(5 * time.Minute)
	}
	return p, nil
}

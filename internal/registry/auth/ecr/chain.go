package ecr

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials/processcreds"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
)

// NoneError says that there are no AWS credentials, and where they were looked for.
type NoneError struct {
	profile  string
	instance error // why the instance has none
}

func (e *NoneError) Error() string {
	return fmt.Sprintf("no AWS credentials: none in the environment (AWS_ACCESS_KEY_ID), no web identity (AWS_WEB_IDENTITY_TOKEN_FILE), "+
		"none in profile %q of ~/.aws, none for this container (AWS_CONTAINER_CREDENTIALS_FULL_URI), and none for this instance: %v", e.profile, e.instance)
}

// chain finds credentials in the order of AWS' own programs:
//
//  1. environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN
//  2. web identity: AWS_WEB_IDENTITY_TOKEN_FILE, AWS_ROLE_ARN (EKS, "IRSA")
//  3. ~/.aws/config and ~/.aws/credentials, AWS_PROFILE: keys, a process, roles
//  4. container: AWS_CONTAINER_CREDENTIALS_FULL_URI (EKS Pod Identity) or _RELATIVE_URI (ECS)
//  5. instance metadata, version 2
type chain struct {
	login  *Login
	region string // of the registry, if the environment has none
	env    config.EnvConfig
}

func newChain(l *Login, region string) *chain { return &chain{login: l, region: region} }

// find returns credentials and the words for where they are from.
func (c *chain) find(ctx context.Context) (aws.Credentials, string, error) {
	var err error
	if c.env, err = config.NewEnvConfig(); err != nil {
		return aws.Credentials{}, "", fmt.Errorf("read AWS settings from the environment: %w", err)
	}
	if c.env.Region != "" {
		c.region = c.env.Region
	}
	switch {
	case c.env.Credentials.HasKeys():
		return c.env.Credentials, "the environment (AWS_ACCESS_KEY_ID)", nil
	case c.env.WebIdentityTokenFilePath != "":
		return c.webIdentity(ctx, c.env.WebIdentityTokenFilePath, c.env.RoleARN, c.env.RoleSessionName, "AWS_WEB_IDENTITY_TOKEN_FILE")
	}
	p, err := c.loadProfile(ctx)
	if err != nil {
		return aws.Credentials{}, "", err
	}
	if c.env.Region == "" && p.Region != "" {
		c.region = p.Region
	}
	return c.ofProfile(ctx, p)
}

// loadProfile reads the files. None at all is an empty profile.
func (c *chain) loadProfile(ctx context.Context) (*config.SharedConfig, error) {
	name := c.env.SharedConfigProfile
	if name == "" {
		name = "default"
	}
	p, err := config.LoadSharedConfigProfile(ctx, name, func(o *config.LoadSharedConfigOptions) {
		if f := c.env.SharedConfigFile; f != "" {
			o.ConfigFiles = []string{f}
		}
		if f := c.env.SharedCredentialsFile; f != "" {
			o.CredentialsFiles = []string{f}
		}
	})
	var missing config.SharedConfigProfileNotExistError
	var unreadable config.SharedConfigLoadError
	switch {
	case err == nil:
		return &p, nil
	case errors.As(err, &missing) && missing.Profile == name && c.env.SharedConfigProfile == "":
		return &config.SharedConfig{Profile: name}, nil
	case errors.As(err, &missing):
		return nil, fmt.Errorf("AWS profile %q does not exist", missing.Profile)
	case errors.As(err, &unreadable):
		// The error below may quote the file.
		return nil, fmt.Errorf("AWS profile %q: %s cannot be read", name, unreadable.Filename)
	}
	return nil, fmt.Errorf("AWS profile %q: %w", name, err)
}

// ofProfile returns a profile's credentials, those of its role if it has one.
func (c *chain) ofProfile(ctx context.Context, p *config.SharedConfig) (aws.Credentials, string, error) {
	source := fmt.Sprintf("profile %q of ~/.aws", p.Profile)
	if p.Source == nil && p.CredentialSource == "" && p.WebIdentityTokenFile != "" {
		return c.webIdentity(ctx, p.WebIdentityTokenFile, p.RoleARN, p.RoleSessionName, source)
	}
	creds, base, err := c.baseOfProfile(ctx, p, source)
	if err != nil || p.RoleARN == "" {
		return creds, base, err
	}
	if p.MFASerial != "" {
		return aws.Credentials{}, "", fmt.Errorf("AWS %s wants a code of a device (mfa_serial), and nobody can be asked", source)
	}
	creds, err = c.assumeRole(ctx, p, creds)
	if err != nil {
		err = fmt.Errorf("with AWS credentials from %s: %w", base, err)
	}
	return creds, fmt.Sprintf("role %s of %s", p.RoleARN, source), err
}

func (c *chain) baseOfProfile(ctx context.Context, p *config.SharedConfig, source string) (aws.Credentials, string, error) {
	switch {
	case p.Source != nil:
		return c.ofProfile(ctx, p.Source)
	case p.Credentials.HasKeys():
		return p.Credentials, source, nil
	case p.CredentialSource == "Environment":
		return aws.Credentials{}, "", fmt.Errorf("AWS %s wants credentials from the environment, which has none", source)
	case p.CredentialSource == "EcsContainer":
		return c.container(ctx)
	case p.CredentialSource == "Ec2InstanceMetadata":
		return c.instance(ctx)
	case p.SSOSessionName != "" || p.SSOStartURL != "" || p.LoginSession != "":
		return aws.Credentials{}, "", fmt.Errorf("AWS %s needs a login by browser (SSO), which is not supported: put docker-credential-ecr-login in PATH", source)
	case p.CredentialProcess != "":
		creds, err := processcreds.NewProvider(p.CredentialProcess).Retrieve(ctx)
		if err != nil {
			// The error below has what the process printed.
			err = fmt.Errorf("AWS %s: its credential_process failed", source)
		}
		return creds, "the credential_process of " + source, err
	case c.env.ContainerCredentialsRelativePath != "" || c.env.ContainerCredentialsEndpoint != "":
		return c.container(ctx)
	}
	return c.instance(ctx)
}

// container asks the service that EKS Pod Identity and ECS have for a container's credentials.
func (c *chain) container(ctx context.Context) (aws.Credentials, string, error) {
	fail := func(variable string, err error) (aws.Credentials, string, error) {
		return aws.Credentials{}, "", fmt.Errorf("AWS credentials from %s: %w", variable, err)
	}
	variable, endpoint := "AWS_CONTAINER_CREDENTIALS_FULL_URI", c.env.ContainerCredentialsEndpoint
	if path := c.env.ContainerCredentialsRelativePath; path != "" {
		variable, endpoint = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "http://169.254.170.2"+path
	}
	if endpoint == "" {
		return fail(variable, errors.New("it is not set"))
	}
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" {
		return fail(variable, errors.New("it is not a URL"))
	}
	doer := c.login.api
	if u.Scheme != "https" {
		if err := besideUs(u.Hostname()); err != nil {
			return fail(variable, err)
		}
		doer = c.login.local
	}
	token := c.env.ContainerAuthorizationToken
	if f := os.Getenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"); f != "" {
		raw, err := os.ReadFile(f)
		if err != nil {
			return fail("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", err)
		}
		token = strings.TrimSpace(string(raw))
	}
	header := map[string]string{}
	if token != "" {
		header["Authorization"] = token
	}
	creds, err := getKeys(ctx, doer, endpoint, header, token)
	if err != nil {
		return fail(variable, err)
	}
	return creds, "this container's service (" + variable + ")", nil
}

// besideUs refuses to speak plain HTTP to anything but this machine and the two
// services that are on its link.
func besideUs(host string) error {
	switch ip := net.ParseIP(host); {
	case host == "localhost", ip.IsLoopback(), ip.Equal(net.IPv4(169, 254, 170, 2)), ip.Equal(net.IPv4(169, 254, 170, 23)), ip.Equal(net.ParseIP("fd00:ec2::23")):
		return nil
	}
	return fmt.Errorf("plain HTTP to %q is not allowed", host)
}

// instance asks the metadata service of EC2, in its second version: the first
// would give credentials to whoever can make this process send a GET.
func (c *chain) instance(ctx context.Context) (aws.Credentials, string, error) {
	creds, err := c.ofInstance(ctx)
	if err != nil {
		profile := c.env.SharedConfigProfile
		if profile == "" {
			profile = "default"
		}
		return aws.Credentials{}, "", &NoneError{profile: profile, instance: err}
	}
	return creds, "this instance's metadata service", nil
}

func (c *chain) ofInstance(ctx context.Context) (aws.Credentials, error) {
	if c.env.EC2IMDSClientEnableState == imds.ClientDisabled {
		return aws.Credentials{}, errors.New("AWS_EC2_METADATA_DISABLED is set")
	}
	base := strings.TrimSuffix(c.env.EC2IMDSEndpoint, "/")
	switch {
	case base != "":
	case c.env.EC2IMDSEndpointMode == imds.EndpointModeStateIPv6:
		base = "http://[fd00:ec2::254]"
	default:
		base = "http://169.254.169.254"
	}
	const roles = "/latest/meta-data/iam/security-credentials/"
	token, err := fetch(ctx, c.login.local, http.MethodPut, base+"/latest/api/token", map[string]string{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "300"})
	if err != nil {
		return aws.Credentials{}, err
	}
	header := map[string]string{"X-Aws-Ec2-Metadata-Token": string(token)}
	list, err := fetch(ctx, c.login.local, http.MethodGet, base+roles, header, string(token))
	if err != nil {
		return aws.Credentials{}, err
	}
	role, _, _ := strings.Cut(strings.TrimSpace(string(list)), "\n")
	if role == "" {
		return aws.Credentials{}, errors.New("the instance has no role")
	}
	return getKeys(ctx, c.login.local, base+roles+url.PathEscape(role), header, string(token))
}

// getKeys gets credentials in the form that the services beside a process have.
func getKeys(ctx context.Context, from *http.Client, url string, header map[string]string, secret string) (aws.Credentials, error) {
	answer, err := fetch(ctx, from, http.MethodGet, url, header, secret)
	if err != nil {
		return aws.Credentials{}, err
	}
	var k struct{ AccessKeyID, SecretAccessKey, Token string }
	if json.Unmarshal(answer, &k) != nil || k.AccessKeyID == "" || k.SecretAccessKey == "" {
		return aws.Credentials{}, fmt.Errorf("%s: the answer has no credentials", host(url))
	}
	return aws.Credentials{AccessKeyID: k.AccessKeyID, SecretAccessKey: k.SecretAccessKey, SessionToken: k.Token}, nil
}

package ecr

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
)

// stsEndpoint is the base URL of the service that gives out credentials of roles.
func (c *chain) stsEndpoint() string {
	if u := configured("AWS_ENDPOINT_URL_STS"); u != "" {
		return u
	}
	domain, _ := domains(c.region)
	return "https://sts." + c.region + "." + domain
}

// webIdentity trades a token of another identity provider, a pod's service
// account, for credentials of a role. The call is not signed: the token is what counts.
func (c *chain) webIdentity(ctx context.Context, file, role, session, source string) (aws.Credentials, string, error) {
	fail := func(err error) (aws.Credentials, string, error) {
		return aws.Credentials{}, "", fmt.Errorf("AWS credentials of a web identity (%s): %w", source, err)
	}
	if role == "" {
		return fail(errors.New("no role is named (AWS_ROLE_ARN)"))
	}
	raw, err := os.ReadFile(file)
	if err != nil {
		return fail(err)
	}
	token := strings.TrimSpace(string(raw))
	form := url.Values{"WebIdentityToken": {token}}
	creds, err := c.sts(ctx, "AssumeRoleWithWebIdentity", role, session, form, nil, token)
	if err != nil {
		return fail(err)
	}
	return creds, fmt.Sprintf("web identity, role %s (%s)", role, source), nil
}

// assumeRole trades credentials for those of a profile's role.
func (c *chain) assumeRole(ctx context.Context, p *config.SharedConfig, base aws.Credentials) (aws.Credentials, error) {
	form := url.Values{}
	if p.ExternalID != "" {
		form.Set("ExternalId", p.ExternalID)
	}
	if d := p.RoleDurationSeconds; d != nil {
		form.Set("DurationSeconds", fmt.Sprint(int(d.Seconds())))
	}
	return c.sts(ctx, "AssumeRole", p.RoleARN, p.RoleSessionName, form, &base, p.ExternalID)
}

func (c *chain) sts(ctx context.Context, action, role, session string, form url.Values, base *aws.Credentials, secrets ...string) (aws.Credentials, error) {
	if session == "" {
		session = "kiln"
	}
	form.Set("Action", action)
	form.Set("Version", "2011-06-15")
	form.Set("RoleArn", role)
	form.Set("RoleSessionName", session)
	answer, err := c.login.do(ctx, call{
		name: "sts:" + action, service: "sts", region: c.region, url: c.stsEndpoint() + "/", body: form.Encode(), creds: base, secrets: secrets,
		header: map[string]string{"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"},
	})
	if err != nil {
		return aws.Credentials{}, err
	}
	type keys struct {
		ID     string `xml:"AccessKeyId"`
		Secret string `xml:"SecretAccessKey"`
		Token  string `xml:"SessionToken"`
	}
	var a struct {
		Role keys `xml:"AssumeRoleResult>Credentials"`
		Web  keys `xml:"AssumeRoleWithWebIdentityResult>Credentials"`
	}
	if err := xml.Unmarshal(bytes.TrimSpace(answer), &a); err != nil {
		return aws.Credentials{}, fmt.Errorf("sts:%s: the answer is not XML", action)
	}
	k := a.Role
	if k == (keys{}) {
		k = a.Web
	}
	if k.ID == "" || k.Secret == "" {
		return aws.Credentials{}, fmt.Errorf("sts:%s: the answer has no credentials", action)
	}
	return aws.Credentials{AccessKeyID: k.ID, SecretAccessKey: k.Secret, SessionToken: k.Token}, nil
}

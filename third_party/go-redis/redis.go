// Package redis stands for the client of Redis where none is wanted: every command fails.
package redis

import (
	"context"
	"crypto/tls"
	"errors"
	"time"
)

// Nil would be the answer that there is no value.
const Nil = noValue("redis: nil")

type noValue string

func (n noValue) Error() string { return string(n) }

var errLeftOut = errors.New("redis: left out of this binary")

// UniversalOptions has the real one's fields, as far as distribution sets them.
type UniversalOptions struct {
	Addrs                 []string
	ClientName            string
	DB                    int
	Protocol              int
	Username              string
	Password              string
	SentinelUsername      string
	SentinelPassword      string
	MaxRetries            int
	MinRetryBackoff       time.Duration
	MaxRetryBackoff       time.Duration
	DialTimeout           time.Duration
	ReadTimeout           time.Duration
	WriteTimeout          time.Duration
	ContextTimeoutEnabled bool
	PoolFIFO              bool
	PoolSize              int
	PoolTimeout           time.Duration
	MinIdleConns          int
	MaxIdleConns          int
	MaxActiveConns        int
	ConnMaxIdleTime       time.Duration
	ConnMaxLifetime       time.Duration
	MaxRedirects          int
	ReadOnly              bool
	RouteByLatency        bool
	RouteRandomly         bool
	MasterName            string
	DisableIdentity       bool
	IdentitySuffix        string
	UnstableResp3         bool
	TLSConfig             *tls.Config
	OnConnect             func(context.Context, *Conn) error
}

// UniversalClient is a client.
type UniversalClient = *Client

// Client has the commands that distribution gives.
type Client struct{}

// NewUniversalClient returns a client whose commands fail.
func NewUniversalClient(*UniversalOptions) UniversalClient { return &Client{} }

// Conn is a connection.
type Conn struct{ Client }

// Cmd is a command that has failed.
type Cmd[T any] struct{}

// Err is why.
func (Cmd[T]) Err() error { return errLeftOut }

// Result is nothing.
func (Cmd[T]) Result() (none T, err error) { return none, errLeftOut }

// PoolStats counts connections.
type PoolStats struct{ TotalConns, IdleConns uint32 }

// PoolStats implements a client's.
func (*Client) PoolStats() *PoolStats { return &PoolStats{} }

// Ping and all that follow fail.
func (*Client) Ping(context.Context) (c Cmd[string])                      { return c }
func (*Client) Del(context.Context, ...string) (c Cmd[int64])             { return c }
func (*Client) HDel(context.Context, string, ...string) (c Cmd[int64])    { return c }
func (*Client) HGet(context.Context, string, string) (c Cmd[string])      { return c }
func (*Client) HMGet(context.Context, string, ...string) (c Cmd[[]any])   { return c }
func (*Client) HMSet(context.Context, string, ...any) (c Cmd[bool])       { return c }
func (*Client) HSetNX(context.Context, string, string, any) (c Cmd[bool]) { return c }
func (*Client) HSet(context.Context, string, ...any) (c Cmd[int64])       { return c }
func (*Client) SAdd(context.Context, string, ...any) (c Cmd[int64])       { return c }
func (*Client) SRem(context.Context, string, ...any) (c Cmd[int64])       { return c }
func (*Client) SIsMember(context.Context, string, any) (c Cmd[bool])      { return c }
func (c *Client) TxPipeline() *Client                                     { return c }
func (*Client) Exec(context.Context) ([]Cmd[string], error)               { return nil, errLeftOut }

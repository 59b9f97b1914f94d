// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"

	"google.golang.org/grpc"

	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// daemonClient is a client of one daemon's control API. It connects with its first
// call.
type daemonClient struct {
	*client.Client
	app *app
}

// connect makes the client for the daemon that the flags name. The caller
// closes it.
func (a *app) connect() (*daemonClient, error) {
	c, err := client.Dial(a.daemon, client.Options{
		TLS: a.tls, Plaintext: a.plaintext,
		Dial: []grpc.DialOption{
			grpc.WithChainUnaryInterceptor(a.readAnswer), grpc.WithChainStreamInterceptor(a.readStream),
		},
	})
	f := &failure{exit: exitUsage}
	switch _, addressErr := client.SocketPath(a.daemon); {
	case err == nil:
		return &daemonClient{c, a}, nil
	case addressErr != nil:
		f.remedy = "give --daemon or MIGRATED_DAEMON as unix:///PATH or HOST:PORT"
	case errors.Is(err, client.ErrEncryption):
		f.remedy = "give --tls-certificate, --tls-key and --tls-ca; or --plaintext, where nobody else is on the network"
	default:
		f.remedy = "give --tls-certificate, --tls-key and --tls-ca, all three"
	}
	f.message = err.Error()
	return nil, f
}

// withClient calls do with a client and a context that --timeout bounds.
func (a *app) withClient(do func(ctx context.Context, c *daemonClient) error) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(a.ctx, a.timeout)
	defer cancel()
	return do(ctx, c)
}

// all returns all migrations that the daemon knows.
func (c *daemonClient) all(ctx context.Context) ([]*migratedv1.Migration, error) {
	migrations, _, err := c.ListAll(ctx, nil)
	return migrations, err
}

// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/internal/traces"
	"github.com/migrated-vm/migrated/pkg/mtls"
)

// tracesTimeout bounds how long the daemon, when it stops, waits for a collector.
const tracesTimeout = 3 * time.Second

// openTraces starts to send traces to the collector of the configuration, if there is one. Nothing waits for the
// collector, even if it cannot be reached.
func (d *Daemon) openTraces() error {
	address := d.cfg.TracesTo
	if address == "" {
		return nil
	}
	creds, err := d.collectorCredentials(address)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(creds), grpc.WithConnectParams(reconnect))
	if err != nil {
		return err
	}
	d.traces, err = traces.New(d.ctx, conn, d.version, d.log)
	return err
}

// collectorCredentials returns the credentials for a collector. It is reached by mutual TLS, with a certificate for its
// host name, or without encryption if it is on this host, as collectors are by default.
func (d *Daemon) collectorCredentials(address string) (credentials.TransportCredentials, error) {
	files, encrypted := d.cfg.TLS()
	if !encrypted || mtls.Loopback(address) { // Validate allows another host without encryption only with plaintext
		return insecure.NewCredentials(), nil
	}
	return files.Client(address, nil)
}

// closeTraces sends the spans that are left.
func (d *Daemon) closeTraces() {
	ctx, cancel := context.WithTimeout(context.Background(), tracesTimeout)
	defer cancel()
	if err := d.traces.Close(ctx); err != nil {
		d.log.Warn("traces are lost", "error", err)
	}
}

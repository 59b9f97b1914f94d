// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/internal/mtls"
	"github.com/migrated-vm/migrated/internal/traces"
)

// tracesTimeout bounds what the end of the daemon waits for a collector.
const tracesTimeout = 3 * time.Second

// openTraces begins to tell the collector of the configuration of migrations, if there is one. Nothing waits for it,
// also where it cannot be reached.
func (d *Daemon) openTraces() error {
	to := d.cfg.TracesTo
	if to == "" {
		return nil
	}
	creds, err := d.collectorCredentials(to)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+to,
		grpc.WithTransportCredentials(creds), grpc.WithConnectParams(reconnect))
	if err != nil {
		return err
	}
	d.traces, err = traces.New(d.ctx, conn, d.version, d.log)
	return err
}

// collectorCredentials are those of this daemon, for a collector whose certificate is for its host; one on this host
// speaks without, as they do by default.
func (d *Daemon) collectorCredentials(to string) (credentials.TransportCredentials, error) {
	files, encrypted := d.cfg.TLS()
	if !encrypted || mtls.Loopback(to) { // the configuration has it no other way but with plaintext
		return insecure.NewCredentials(), nil
	}
	return files.Client(to, nil)
}

// closeTraces sends what is left.
func (d *Daemon) closeTraces() {
	ctx, cancel := context.WithTimeout(context.Background(), tracesTimeout)
	defer cancel()
	if err := d.traces.Close(ctx); err != nil {
		d.log.Warn("traces are lost", "error", err)
	}
}

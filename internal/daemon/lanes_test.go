// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// The hosts of these tests. On Linux all of 127.0.0.0/8 is on loopback.
const (
	hostile = "127.0.0.66"
	honest  = "127.0.0.7"
)

// patience bounds every wait, so that a test fails if what it waits for never happens.
const patience = 30 * time.Second

// from returns a dialer with the address of a host.
func from(host string) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}, Timeout: patience}
}

// connect makes a gRPC connection from a host to a daemon without TLS, at its address for peers.
func connect(t *testing.T, d *Daemon, host string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+net.JoinHostPort("127.0.0.1", d.pagePort), append(pagewire.DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return from(host).DialContext(ctx, "tcp", address)
		}))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// A honestLane is the lane of a migration that must go on whatever the hostile host does.
type honestLane struct {
	t      *testing.T
	stream migratedv1.PageService_FetchClient
	page   uint64
}

const laneRAM = 1 << 20

// serveLane offers memory and opens a lane to it.
func serveLane(t *testing.T, d *Daemon, id string) *honestLane {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ram")
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, laneRAM), 0o600); err != nil {
		t.Fatal(err)
	}
	ram, err := pagesrv.OpenRAM([]pagesrv.Block{{ID: "ram0", Path: path, Size: laneRAM, PageSize: 4096}})
	if err != nil {
		t.Fatal(err)
	}
	export, err := d.pages.Offer(id, "secret", ram, func(context.Context) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		export.Withdraw()
		if err := ram.Close(); err != nil {
			t.Error(err)
		}
	})
	return openLane(t, connect(t, d, honest), id)
}

func openLane(t *testing.T, conn *grpc.ClientConn, id string) *honestLane {
	t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(),
		pagewire.MigrationIDKey, id, pagewire.MigrationTokenKey, "secret"))
	t.Cleanup(cancel)
	stream, err := migratedv1.NewPageServiceClient(conn).Fetch(ctx)
	if err == nil {
		_, err = stream.Header()
	}
	if err != nil {
		t.Fatalf("a lane is refused: %v", err)
	}
	return &honestLane{t: t, stream: stream}
}

// goesOn checks that the lane still fetches pages.
func (l *honestLane) goesOn() {
	l.t.Helper()
	for range 20 {
		l.fetch()
	}
}

func (l *honestLane) fetch() {
	l.t.Helper()
	l.page = (l.page + 1) % (laneRAM / 4096)
	if err := l.stream.SendMsg(&pagewire.Request{
		Ranges: []pagewire.Range{{Offset: l.page * 4096, Length: 4096}},
	}); err != nil && !errors.Is(err, io.EOF) { // RecvMsg has the cause
		l.t.Fatalf("the lane is over: %v", err)
	}
	var reply pagewire.Reply
	if err := l.stream.RecvMsg(&reply); err != nil {
		l.t.Fatalf("the lane is over: %v", err)
	}
	if len(reply.Data) != 4096 || reply.Data[0] != 7 {
		l.t.Fatalf("%d bytes of another page", len(reply.Data))
	}
	reply.Release()
}

func startPlain(t *testing.T) *Daemon {
	t.Helper()
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	d, _ := startConfigured(t, cfg)
	return d
}

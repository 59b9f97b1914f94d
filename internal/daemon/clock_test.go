// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
	"github.com/migrated-vm/migrated/pkg/pagelane/netconn"
	"github.com/migrated-vm/migrated/pkg/pagelane/tcpkeepalive"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// connections remembers the connections that it has made, to close them.
type connections struct {
	mu  sync.Mutex
	all []net.Conn
}

func (w *connections) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err == nil {
		w.mu.Lock()
		w.all = append(w.all, conn)
		w.mu.Unlock()
	}
	return conn, err
}

func (w *connections) closeAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, conn := range w.all {
		_ = conn.Close()
	}
	w.all = nil
}

// TestCertificatesOutOfTime replaces certificates by some that are not valid now, as they are after a clock has jumped.
// Existing connections continue. New ones are refused by either side, with a message. A grpc.ClientConn, as the source
// of a migration keeps, works again when the certificate is valid again.
func TestCertificatesOutOfTime(t *testing.T) {
	now := time.Now()
	ca, err := mtlstest.NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	issue := func(end time.Time, name string) {
		t.Helper()
		if _, err := ca.IssueUntil(end, name, "127.0.0.1"); err != nil {
			t.Fatal(err)
		}
	}
	files, err := ca.IssueUntil(now.Add(time.Hour), "here", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ca.IssueUntil(now.Add(time.Hour), "there", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	cfg := config.Default()
	cfg.Listen = "127.0.0.1:0"
	cfg.TLSCertificate, cfg.TLSKey, cfg.TLSCA = files.Certificate, files.Key, files.CA
	there, _ := startConfigured(t, cfg)

	here := &Daemon{cfg: config.Config{TLSCertificate: theirs.Certificate, TLSKey: theirs.Key, TLSCA: theirs.CA}}
	var made connections
	conn, err := here.dial(net.JoinHostPort("127.0.0.1", there.pagePort), grpc.WithContextDialer(made.dial))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := migratedv1.NewPeerServiceClient(conn)
	check := func() error {
		_, err := client.CheckHost(t.Context(), &migratedv1.CheckHostRequest{})
		return err
	}
	wantCode(t, "at first", check(), codes.OK)
	for _, c := range []struct {
		name, file string
		end        time.Time
	}{
		{"expired there", "there", now.Add(-time.Minute)}, // a clock that was put ahead
		{"expired here", "here", now.Add(-time.Minute)},
		{"not valid yet here", "here", now.Add(30 * time.Hour)}, // a clock that was put back
	} {
		name, file := c.name, c.file
		issue(c.end, file)
		wantCode(t, name+": what is connected", check(), codes.OK)
		made.closeAll()
		refused := check()
		for deadline := time.Now().Add(patience); status.Code(refused) != codes.Unavailable ||
			!strings.Contains(refused.Error(), "expired"); refused = check() {
			if time.Now().After(deadline) {
				t.Fatalf("%s: a connection with a certificate of another time: %v", name, refused)
			}
		}
		issue(now.Add(time.Hour), file)
		again, cancel := context.WithTimeout(t.Context(), patience)
		if _, err := client.CheckHost(again, &migratedv1.CheckHostRequest{}, grpc.WaitForReady(true)); err != nil {
			t.Errorf("%s: with the right certificate again: %v", name, err)
		}
		cancel()
	}
}

// TestKernelKeepsConnectionsAlive: the kernel detects a dead host, at both ends of a connection. It does not depend on
// the wall clock.
func TestKernelKeepsConnectionsAlive(t *testing.T) {
	bare, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer closeQuietly(bare)
	l := limits.NewPeers(limits.NewRefusals(slog.New(slog.DiscardHandler))).Listener(bare)
	dialled, err := tcpkeepalive.Dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	for name, conn := range map[string]net.Conn{"dialled": dialled, "accepted": accepted} {
		tcp, ok := netconn.Find[*net.TCPConn](conn)
		if !ok {
			t.Fatalf("%s: a %T is no TCP connection", name, conn)
		}
		raw, err := tcp.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		for option, want := range map[int]int{
			unix.TCP_KEEPIDLE:             int(tcpkeepalive.Quiet.Seconds()),
			unix.TCP_KEEPINTVL:            int(tcpkeepalive.Answer.Seconds()),
			unix.TCP_KEEPCNT:              1,
			unix.TCP_USER_TIMEOUT:         int((tcpkeepalive.Quiet + tcpkeepalive.Answer).Milliseconds()),
			unix.TCP_THIN_LINEAR_TIMEOUTS: 1,
		} {
			got, optionErr := 0, error(nil)
			if err := raw.Control(func(fd uintptr) {
				got, optionErr = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option)
			}); err != nil || optionErr != nil || got != want {
				t.Errorf("%s: option %d is %d, want %d (%v, %v)", name, option, got, want, err, optionErr)
			}
		}
	}
}

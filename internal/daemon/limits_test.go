// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/config"
	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// The hosts of these tests. Linux has all of 127.0.0.0/8.
const (
	hostile = "127.0.0.66"
	honest  = "127.0.0.7"
)

// patience bounds every wait, so that what never comes fails a test.
const patience = 30 * time.Second

// from dials as a host.
func from(host string) *net.Dialer {
	return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}, Timeout: patience}
}

// connect is a gRPC connection from a host to the peers' address of a daemon without TLS.
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

// A honestLane is the lane of a migration that must not be disturbed.
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

// goesOn fetches pages.
func (l *honestLane) goesOn() {
	l.t.Helper()
	for range 20 {
		l.fetch()
	}
}

func (l *honestLane) fetch() {
	l.t.Helper()
	l.page = (l.page + 1) % (laneRAM / 4096)
	if err := l.stream.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{{Offset: l.page * 4096, Length: 4096}}}); err != nil {
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

// flood opens so many connections from the hostile host, writes greeting to each and says on how many the server speaks.
func flood(t *testing.T, d *Daemon, n int, greeting []byte) (served []net.Conn) {
	t.Helper()
	var open []net.Conn
	for range n {
		c, err := from(hostile).Dial("tcp", net.JoinHostPort("127.0.0.1", d.pagePort))
		if err != nil {
			continue // reset at once
		}
		t.Cleanup(func() { _ = c.Close() })
		_, _ = c.Write(greeting)
		open = append(open, c)
	}
	for _, c := range open {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		var first [1]byte
		if _, err := c.Read(first[:]); err == nil {
			served = append(served, c)
		} else if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("neither served nor refused")
		}
	}
	return served
}

// hello is what a client of HTTP/2 says first.
func hello(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	if err := http2.NewFramer(&b, nil).WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// call are the headers of a gRPC call.
func call(t *testing.T, path string) []byte {
	t.Helper()
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, f := range [][2]string{
		{":method", "POST"}, {":scheme", "http"}, {":path", path}, {":authority", "x"},
		{"content-type", "application/grpc"}, {"te", "trailers"},
	} {
		if err := e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// One host opens connections without end: it gets its share, and the others theirs.
func TestFloodOfConnections(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	served := flood(t, d, limits.ConnectionsPerPeer+60, hello(t).Bytes())
	if len(served) > limits.ConnectionsPerPeer || len(served) < limits.ConnectionsPerPeer/2 {
		t.Errorf("%d connections are served", len(served))
	}
	if n := d.refusals.Total(); n < 60 {
		t.Errorf("%d refusals are counted", n)
	}
	lane.goesOn()
	openLane(t, connect(t, d, honest), "m").goesOn()
	for _, c := range served {
		_ = c.Close()
	}
	// What it had is given back: the connection's end and the next one race, and the rate counts.
	end := time.Now().Add(patience)
	for len(flood(t, d, 1, hello(t).Bytes())) == 0 {
		if time.Now().After(end) {
			t.Fatal("no connection is served again")
		}
	}
}

// Connections on which nothing is said hold a few places for a few seconds.
func TestHalfOpenHandshakes(t *testing.T) {
	s := startSecured(t)
	var open []net.Conn
	for range limits.HandshakesPerPeer + 60 {
		c, err := from(hostile).Dial("tcp", s.peers)
		if err != nil {
			continue
		}
		t.Cleanup(func() { _ = c.Close() })
		open = append(open, c)
	}
	for end := time.Now().Add(patience); s.daemon.refusals.Total() < 60-1; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d of %d are refused", s.daemon.refusals.Total(), len(open))
		}
	}
	// From another address: while they last, a new connection with a handshake, and calls.
	_, err := migratedv1.NewPeerServiceClient(s.as(t, "a.example", s.peers)).CheckHost(t.Context(), &migratedv1.CheckHostRequest{})
	wantCode(t, "CheckHost beside them", err, codes.OK)
	for _, c := range open {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the daemon waits without end for a handshake: %v", err)
		}
	}
}

// Frames that never end, by each connection that the host can have.
func TestSlowHTTP2(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	endless := hello(t)
	framer := http2.NewFramer(endless, nil)
	if err := framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: call(t, migratedv1.PageService_Fetch_FullMethodName)}); err != nil {
		t.Fatal(err)
	}
	half := hello(t).Bytes()
	half = half[:len(half)/2]
	for _, greeting := range [][]byte{endless.Bytes(), half, []byte("G")} {
		flood(t, d, 40, greeting)
		lane.goesOn()
	}
	openLane(t, connect(t, d, honest), "m").goesOn()
}

// A connection has no more calls at once than a daemon needs.
func TestCallsOnOneConnection(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	c, err := from(hostile).Dial("tcp", net.JoinHostPort("127.0.0.1", d.pagePort))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := hello(t)
	framer := http2.NewFramer(b, c)
	const calls = 3 * limits.Streams
	for i := range calls { // each waits for a first message
		if err := framer.WriteHeaders(http2.HeadersFrameParam{
			StreamID: uint32(2*i + 1), BlockFragment: call(t, migratedv1.PeerService_LoadDeviceState_FullMethodName), EndHeaders: true,
		}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Write(b.Bytes()); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	for refused := 0; refused < calls-limits.Streams; {
		frame, err := framer.ReadFrame()
		if err != nil {
			t.Fatalf("%d of %d calls are refused: %v", refused, calls, err)
		}
		if reset, ok := frame.(*http2.RSTStreamFrame); ok {
			if reset.ErrCode != http2.ErrCodeRefusedStream {
				t.Fatalf("call %d ends with %v", reset.StreamID, reset.ErrCode)
			}
			refused++
		}
	}
	lane.goesOn()
}

// One host asks without end for migrations that cannot be.
func TestFloodOfPrepares(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	prepare := func(client migratedv1.PeerServiceClient, id string) error {
		_, err := client.PrepareIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{
			Id: id, Protocol: version.Protocol, Machine: &migratedv1.SourceMachine{Name: "vm"},
		})
		return err
	}
	var mu sync.Mutex
	seen := map[codes.Code]int{}
	var group sync.WaitGroup
	for worker := range 8 {
		client := migratedv1.NewPeerServiceClient(connect(t, d, hostile))
		group.Go(func() {
			for i := range 20 {
				err := prepare(client, fmt.Sprintf("flood-%d-%d", worker, i))
				mu.Lock()
				seen[status.Code(err)]++
				mu.Unlock()
			}
		})
	}
	lane.goesOn()
	group.Wait()
	if seen[codes.ResourceExhausted] < 80 || len(seen) > 2 || seen[codes.FailedPrecondition] == 0 {
		t.Errorf("the codes of 160 calls: %v", seen)
	}
	// Nobody else is meant.
	wantCode(t, "another host", prepare(migratedv1.NewPeerServiceClient(connect(t, d, honest)), "other"), codes.FailedPrecondition)
	lane.goesOn()
}

func TestOversizedMessages(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	client := migratedv1.NewPeerServiceClient(connect(t, d, hostile))
	for what, request := range map[string]*migratedv1.PrepareIncomingRequest{
		"a long command line": {Id: "m", Machine: &migratedv1.SourceMachine{CommandLine: []string{strings.Repeat("x", 2*limits.MessageBytes)}}},
		"a long id":           {Id: strings.Repeat("x", 2*limits.MessageBytes)},
	} {
		_, err := client.PrepareIncoming(t.Context(), request)
		wantCode(t, what, err, codes.ResourceExhausted)
		lane.goesOn()
	}
	_, err := client.PrepareIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{
		Id: "m", Protocol: version.Protocol, PageAddresses: make([]string, maxPageAddresses+1),
	})
	wantCode(t, "many page addresses", err, codes.InvalidArgument)
	stream, err := client.LoadDeviceState(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&migratedv1.LoadDeviceStateRequest{Id: "m", Data: make([]byte, 2*limits.MessageBytes)})
	_, err = stream.CloseAndRecv()
	wantCode(t, "a large piece of device state", err, codes.ResourceExhausted)
	lane.goesOn()

	long := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("x", 2*limits.HeaderBytes))
	if _, err := client.CheckHost(long, &migratedv1.CheckHostRequest{}); err == nil {
		t.Error("long metadata is accepted")
	}
	lane.goesOn()
}

// A destination that asks for the same pages without end, on every lane that it can have, and takes no answer on
// some: the lanes of others go on (pagesrv/greed.go), and what it sends is not kept.
func TestGreedyDestination(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	greedy := serveLane(t, d, "greedy")
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	defer group.Wait()
	defer stop()
	whole := []pagewire.Range{{Length: laneRAM}}
	for i := range 12 {
		l := openLane(t, connect(t, d, hostile), "greedy")
		group.Go(func() { // takes them
			for range 1000 {
				var reply pagewire.Reply
				if ctx.Err() != nil || l.stream.SendMsg(&pagewire.Request{Ranges: whole}) != nil || l.stream.RecvMsg(&reply) != nil {
					return
				}
				reply.Release()
			}
		})
		if i%4 == 0 {
			deaf := openLane(t, connect(t, d, hostile), "greedy")
			go func() { // ends with its stream
				for range 100_000 {
					if deaf.stream.SendMsg(&pagewire.Request{Ranges: whole}) != nil {
						return
					}
				}
			}()
		}
	}
	for range 5 {
		lane.goesOn()
	}
	greedy.fetch() // it has hurt itself alone
}

// crowd is a registry with so many migrations under way from one host.
func crowd(t *testing.T, r *registry, sender string, n, most int) error {
	t.Helper()
	for i := range n {
		id := fmt.Sprintf("%s-%d", sender, i)
		d, _, err := r.addDestination(id, sender, most, func() *migration.Destination {
			return migration.NewDestination(t.Context(), migration.DestinationConfig{
				Request: &migratedv1.PrepareIncomingRequest{Id: id}, Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
			})
		})
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = d.Abort("the test is over") })
	}
	return nil
}

// A host that is one's source of half of what may come is refused, others are not.
func TestMigrationsAtOnce(t *testing.T) {
	r := newRegistry()
	if err := crowd(t, r, "a", 2, 4); err != nil {
		t.Fatal(err)
	}
	var crowded *crowdedError
	if err := crowd(t, r, "a", 1, 4); !errors.Is(err, errIDTaken) {
		t.Errorf("an id that is taken: %v", err)
	}
	r.destinations["a-9"], r.senders["a-9"] = r.destinations["a-0"], "a"
	delete(r.destinations, "a-0")
	if err := crowd(t, r, "a", 1, 4); !errors.As(err, &crowded) || crowded.sender != "a" {
		t.Errorf("a third of a: %v", err)
	}
	if err := crowd(t, r, "b", 2, 4); err != nil {
		t.Errorf("b is refused: %v", err)
	}
	if err := crowd(t, r, "c", 1, 4); !errors.As(err, &crowded) || crowded.sender != "" {
		t.Errorf("a fifth in all: %v", err)
	}
	if err := r.destinations["a-9"].Abort("it is over"); err != nil {
		t.Fatal(err)
	}
	<-r.destinations["a-9"].Done()
	if err := crowd(t, r, "c", 1, 4); err != nil {
		t.Errorf("there is room again: %v", err)
	}
}

// However many attempts fail, a bounded number is remembered and has a directory.
func TestFailedAttemptsAreForgotten(t *testing.T) {
	d := startPlain(t)
	for i := range keptMigrations + 10 {
		id := fmt.Sprintf("m-%d", i)
		destination, err := d.expectIncoming(t.Context(), &migratedv1.PrepareIncomingRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := destination.Prepare(t.Context()); err == nil {
			t.Fatal("a VM without a command line was prepared")
		}
	}
	entries, err := os.ReadDir(d.incomingDir())
	if err != nil || len(entries) != keptMigrations || len(d.migrations.senders) != keptMigrations {
		t.Errorf("%d directories, %d senders, want %d (%v)", len(entries), len(d.migrations.senders), keptMigrations, err)
	}
	if err := migration.RemoveEnded(d.incomingDir()); err != nil {
		t.Error(err)
	}
	if _, err := os.ReadDir(filepath.Join(d.incomingDir(), "m-20")); err == nil {
		t.Error("a restart keeps directories of what is over")
	}
}

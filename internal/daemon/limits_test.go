// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/limits"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// knock opens a connection from the hostile host and writes greeting to it; nil: it was reset at once.
func knock(t *testing.T, d *Daemon, greeting []byte) net.Conn {
	t.Helper()
	c, err := from(hostile).Dial("tcp", net.JoinHostPort("127.0.0.1", d.pagePort))
	if err != nil {
		return nil
	}
	t.Cleanup(func() { _ = c.Close() })
	_, _ = c.Write(greeting)
	return c
}

// answered reports whether the server answers on a connection of knock, or refuses it.
func answered(t *testing.T, c net.Conn) bool {
	t.Helper()
	if c == nil {
		return false
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	var first [1]byte
	_, err := c.Read(first[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("neither served nor refused")
	}
	return err == nil
}

// hello returns the first bytes of an HTTP/2 client.
func hello(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	b.WriteString(http2.ClientPreface)
	if err := http2.NewFramer(&b, nil).WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return &b
}

// call returns the headers of a gRPC call.
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

// TestFloodOfConnections: a host that opens connections without end gets its share, and others get theirs.
func TestFloodOfConnections(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	var served []net.Conn
	for range limits.ConnectionsPerPeer + 60 {
		// One after the other: of those that wait for their handshake, the server would refuse most.
		if c := knock(t, d, hello(t).Bytes()); answered(t, c) {
			served = append(served, c)
		}
	}
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
	// Closed connections make room for others, after a while: the server has to notice, and the rate is limited.
	end := time.Now().Add(patience)
	for !answered(t, knock(t, d, hello(t).Bytes())) {
		if time.Now().After(end) {
			t.Fatal("no connection is served again")
		}
	}
}

// TestHalfOpenHandshakes: connections without a handshake are few, and are closed after a few seconds.
func TestHalfOpenHandshakes(t *testing.T) {
	s := startSecured(t)
	var open []net.Conn
	const dialed = limits.HandshakesPerPeer + 60
	began := time.Now()
	for range dialed {
		c, err := from(hostile).Dial("tcp", s.peers)
		if err != nil {
			continue
		}
		t.Cleanup(func() { _ = c.Close() })
		open = append(open, c)
	}
	// Meanwhile another address can connect, with a handshake, and call.
	_, err := migratedv1.NewPeerServiceClient(s.as(t, "a.example", s.peers)).CheckHost(
		t.Context(), &migratedv1.CheckHostRequest{})
	wantCode(t, "CheckHost beside them", err, codes.OK)
	// That connection was accepted after all others. On a busy machine some were accepted when earlier ones were closed.
	most := limits.HandshakesPerPeer * (1 + int(time.Since(began)/limits.HandshakeTime))
	if n := int(s.daemon.refusals.Total()); n < dialed-most {
		t.Errorf("%d of %d are refused, with places for %d", n, dialed, most)
	}
	for _, c := range open {
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the daemon waits without end for a handshake: %v", err)
		}
	}
}

// TestSlowHTTP2: connections on which a frame never ends do not stop a lane.
func TestSlowHTTP2(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	endless := hello(t)
	framer := http2.NewFramer(endless, nil)
	if err := framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: 1, BlockFragment: call(t, migratedv1.PageService_Fetch_FullMethodName),
	}); err != nil {
		t.Fatal(err)
	}
	half := hello(t).Bytes()
	half = half[:len(half)/2]
	for _, greeting := range [][]byte{endless.Bytes(), half, []byte("G")} {
		var open []net.Conn
		for range 40 {
			open = append(open, knock(t, d, greeting))
		}
		for _, c := range open {
			answered(t, c)
		}
		lane.goesOn()
	}
	openLane(t, connect(t, d, honest), "m").goesOn()
}

// TestCallsOnOneConnection: a connection may have only as many calls at once as a daemon needs.
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
			StreamID: uint32(2*i + 1), BlockFragment: call(t, migratedv1.PeerService_LoadDeviceState_FullMethodName),
			EndHeaders: true,
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

// TestFloodOfPrepares: a host that prepares impossible migrations without end is slowed down, and others are not.
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
	began := time.Now()
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
	took := time.Since(began) // in which package limits lets pass callBurst and callRate a second
	passed := seen[codes.FailedPrecondition]
	if passed == 0 || float64(passed) > 32+4*took.Seconds()+1 || passed+seen[codes.ResourceExhausted] != 160 {
		t.Errorf("the codes of 160 calls within %v: %v", took, seen)
	}
	// Another host is not limited.
	wantCode(t, "another host", prepare(migratedv1.NewPeerServiceClient(connect(t, d, honest)), "other"),
		codes.FailedPrecondition)
	lane.goesOn()
}

func TestOversizedMessages(t *testing.T) {
	d := startPlain(t)
	lane := serveLane(t, d, "m")
	client := migratedv1.NewPeerServiceClient(connect(t, d, hostile))
	for what, request := range map[string]*migratedv1.PrepareIncomingRequest{
		"a long command line": {Id: "m", Machine: &migratedv1.SourceMachine{
			CommandLine: []string{strings.Repeat("x", 2*limits.MessageBytes)},
		}},
		"a long id": {Id: strings.Repeat("x", 2*limits.MessageBytes)},
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

// TestGreedyDestination: a destination asks for the same pages without end, on every lane that it can have, and reads
// no answers on some. The lanes of others go on (pagesrv/quota.go), and its requests are not kept in memory.
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
				if ctx.Err() != nil || l.stream.SendMsg(&pagewire.Request{Ranges: whole}) != nil ||
					l.stream.RecvMsg(&reply) != nil {
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
		greedy.fetch() // its own lane goes on, too
	}
}

// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/mtls"
	"github.com/migrated-vm/migrated/internal/mtls/mtlstest"
	"github.com/migrated-vm/migrated/internal/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait, so that what never comes fails a test.
const patience = 20 * time.Second

// messages is what both kinds of streams have.
type messages interface {
	SendMsg(any) error
	RecvMsg(any) error
}

type serverStream interface {
	messages
	Context() context.Context
	SendHeader(metadata.MD) error
}

// echo answers each range with a run of its offset's low byte. The call's metadata "how" says how it ends.
func echo(s serverStream) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	how := ""
	if values := md.Get("how"); len(values) == 1 {
		how = values[0]
	}
	if how == "refuse" {
		return status.Error(codes.PermissionDenied, "nö, 100 %")
	}
	if err := s.SendHeader(nil); err != nil {
		return err
	}
	var request pagewire.Request
	var reply pagewire.Reply
	for {
		err := s.RecvMsg(&request)
		switch {
		case errors.Is(err, io.EOF) && how == "fail":
			return status.Error(codes.Aborted, "that was all\nöfter nicht")
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		for _, r := range request.Ranges {
			reply.Lease(int(r.Length))
			for i := range reply.Data {
				reply.Data[i] = byte(r.Offset)
			}
			reply.Runs = append(reply.Runs[:0], pagewire.Run{Block: r.Block, Offset: r.Offset, Length: r.Length})
			if err := s.SendMsg(&reply); err != nil {
				return err
			}
		}
	}
}

type pageService struct {
	migratedv1.UnimplementedPageServiceServer
}

func (pageService) Fetch(s grpc.BidiStreamingServer[migratedv1.FetchRequest, migratedv1.FetchResponse]) error {
	return echo(s)
}

// serve serves the page service: lanes apart, or all by gRPC as sources did before there was this package.
func serve(t testing.TB, creds credentials.TransportCredentials, apart bool, handle func(*Stream) error) (address string, lanes *Server) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	lanes = NewServer(handle)
	if apart {
		creds = lanes.Credentials(creds)
	}
	server := grpc.NewServer(append(pagewire.ServerOptions(), grpc.Creds(creds))...)
	migratedv1.RegisterPageServiceServer(server, pageService{})
	healthpb.RegisterHealthServer(server, health.NewServer())
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		lanes.Close()
	})
	return listener.Addr().String(), lanes
}

func open(t testing.TB, address string, creds credentials.TransportCredentials, md metadata.MD) (*Client, error) {
	t.Helper()
	c, err := Dial(t.Context(), address, creds)
	if err != nil {
		t.Fatal(err)
	}
	return Open(t.Context(), c, md)
}

func openCommon(t testing.TB, address string, creds credentials.TransportCredentials, md metadata.MD) (migratedv1.PageService_FetchClient, error) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, append(pagewire.DialOptions(), grpc.WithTransportCredentials(creds))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := migratedv1.NewPageServiceClient(conn).Fetch(metadata.NewOutgoingContext(t.Context(), md))
	if err == nil {
		_, err = stream.Header()
	}
	return stream, err
}

// fetch asks for a run and checks what comes.
func fetch(t testing.TB, s messages, offset uint64, length uint32) {
	t.Helper()
	if err := s.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{{Block: 3, Offset: offset, Length: length}}}); err != nil {
		t.Fatal(err)
	}
	expect(t, s, offset, length)
}

func expect(t testing.TB, s messages, offset uint64, length uint32) {
	t.Helper()
	var reply pagewire.Reply
	if err := s.RecvMsg(&reply); err != nil {
		t.Fatal(err)
	}
	if len(reply.Runs) != 1 || reply.Runs[0].Offset != offset || reply.Runs[0].Length != length ||
		!bytes.Equal(reply.Data, bytes.Repeat([]byte{byte(offset)}, int(length))) {
		t.Fatalf("%d bytes at %d were asked for; %d came, of %v", length, offset, len(reply.Data), reply.Runs)
	}
	reply.Release()
}

// TestInterworking has either side of this package talk to the other, and to gRPC's.
func TestInterworking(t *testing.T) {
	authority, err := mtlstest.NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	files := func(name string) mtls.Files {
		f, err := authority.Issue(name, "127.0.0.1", "spiffe://test/"+name)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	source, destination := files("source"), files("destination")
	for _, encrypted := range []bool{false, true} {
		for _, old := range []string{"", "source", "destination"} {
			t.Run(fmt.Sprintf("encrypted=%t/old=%s", encrypted, old), func(t *testing.T) {
				server, client := insecure.NewCredentials(), insecure.NewCredentials()
				if encrypted {
					server = source.Server()
				}
				apart := false
				address, _ := serve(t, server, old != "source", func(s *Stream) error {
					if caller, ok := peer.FromContext(s.Context()); !ok || encrypted && len(mtls.Names(caller.AuthInfo)) != 2 {
						t.Errorf("the caller is %v", caller)
					}
					apart = true
					return echo(s)
				})
				if encrypted {
					if client, err = destination.Client(address, nil); err != nil {
						t.Fatal(err)
					}
				}
				begin := func(how string) (messages, func() error, error) {
					if old == "destination" {
						s, err := openCommon(t, address, client.Clone(), metadata.Pairs("how", how))
						return s, s.CloseSend, err
					}
					l, err := open(t, address, client, metadata.Pairs("how", how))
					if err != nil {
						return nil, nil, err
					}
					return l, l.CloseSend, nil
				}
				conversation(t, begin)
				if want := old == ""; apart != want {
					t.Errorf("served apart from gRPC: %t", apart)
				}
			})
		}
	}
}

// conversation fetches runs of all sizes, and ends lanes in all ways.
func conversation(t *testing.T, begin func(how string) (messages, func() error, error)) {
	t.Helper()
	for how, want := range map[string]error{"": io.EOF, "fail": status.Error(codes.Aborted, "that was all\nöfter nicht")} {
		s, closeSend, err := begin(how)
		if err != nil {
			t.Fatal(err)
		}
		for i, length := range []uint32{4096, 4096, 12 << 10, 16 << 10, 512 << 10, 4096, pagewire.MaxData, 4096} {
			fetch(t, s, uint64(i), length)
		}
		if err := closeSend(); err != nil {
			t.Fatal(err)
		}
		err = s.RecvMsg(new(pagewire.Reply))
		if status.Code(err) != status.Code(want) || err.Error() != want.Error() {
			t.Errorf("the end is %v, not %v", err, want)
		}
	}
	s, _, err := begin("refuse")
	if err == nil {
		err = s.RecvMsg(new(pagewire.Reply))
	}
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || st.Message() != "nö, 100 %" {
		t.Errorf("refused with %v", err)
	}
}

// TestGRPCBeside: calls that are no lanes are gRPC's, also of clients that wait after an empty SETTINGS frame.
func TestGRPCBeside(t *testing.T) {
	address, _ := serve(t, insecure.NewCredentials(), true, func(s *Stream) error { return echo(s) })
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 3 {
		if _, err := healthpb.NewHealthClient(conn).Check(ctx, new(healthpb.HealthCheckRequest)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCloseEndsLanes: the client learns that its lane is over, and Close waits for who serves it.
func TestCloseEndsLanes(t *testing.T) {
	served := make(chan error, 1)
	address, lanes := serve(t, insecure.NewCredentials(), true, func(s *Stream) error {
		err := echo(s)
		served <- err
		return err
	})
	l, err := open(t, address, insecure.NewCredentials(), nil)
	if err != nil {
		t.Fatal(err)
	}
	fetch(t, l, 1, 4096)
	lanes.Close()
	select {
	case err := <-served:
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the lane ended with %v", err)
		}
	default:
		t.Error("the lane is served still")
	}
	if err := l.RecvMsg(new(pagewire.Reply)); status.Code(err) != codes.Unavailable {
		t.Errorf("the client is told %v", err)
	}
	if err := l.SendMsg(new(pagewire.Request)); !errors.Is(err, io.EOF) {
		t.Errorf("a request after that: %v", err)
	}
}

// TestHandlerEndsFirst: the handler returns while its goroutine still waits for a request, as when pages are withdrawn.
func TestHandlerEndsFirst(t *testing.T) {
	received := make(chan error, 1)
	address, _ := serve(t, insecure.NewCredentials(), true, func(s *Stream) error {
		if err := s.SendHeader(nil); err != nil {
			return err
		}
		go func() { received <- s.RecvMsg(new(pagewire.Request)) }()
		return status.Error(codes.Aborted, "withdrawn")
	})
	l, err := open(t, address, insecure.NewCredentials(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.RecvMsg(new(pagewire.Reply)); status.Code(err) != codes.Aborted {
		t.Errorf("the client is told %v", err)
	}
	select {
	case err := <-received:
		if err == nil {
			t.Error("a request came that nobody sent")
		}
	case <-time.After(patience):
		t.Error("the lane's goroutine waits for ever")
	}
}

// TestContextEndsLane: whoever waits in RecvMsg or SendMsg is freed.
func TestContextEndsLane(t *testing.T) {
	address, _ := serve(t, insecure.NewCredentials(), true, func(s *Stream) error { return echo(s) })
	c, err := Dial(t.Context(), address, insecure.NewCredentials())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	l, err := Open(ctx, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- l.RecvMsg(new(pagewire.Reply)) }()
	cancel()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a reply to nothing")
		}
	case <-time.After(patience):
		t.Error("RecvMsg waits for ever")
	}
}

func TestDialFails(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	_ = listener.Close()
	if _, err := Dial(t.Context(), address, insecure.NewCredentials()); status.Code(err) != codes.Unavailable {
		t.Errorf("nobody listens: %v", err)
	}
}

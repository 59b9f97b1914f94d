// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"context"
	"errors"
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
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/mtls"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is the longest that a test waits for anything.
const patience = 2 * time.Minute

// clientStream is the client's side of a lane, of this package or of gRPC's library.
type clientStream interface {
	Send(*pagewire.Request) error
	Recv(*pagewire.Reply) error
	CloseSend() error
}

// serverStream is the server's side of a lane, of this package or of gRPC's library.
type serverStream interface {
	Context() context.Context
	Accept() error
	Recv(*pagewire.Request) error
	Send(*pagewire.Reply) error
}

// refusal is the reason in the details of the status with which echo refuses a lane.
const refusal = migratedv1.Reason_REASON_PAGES_REFUSED

// pair has the credentials of a server and of its client.
type pair struct {
	server, client credentials.TransportCredentials
}

func plaintext() pair { return pair{insecure.NewCredentials(), insecure.NewCredentials()} }

// issue creates an authority and the files of one host in a directory.
func issue(t testing.TB, dir string) mtls.Files {
	t.Helper()
	authority, err := mtlstest.NewAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	files, err := authority.Issue("host", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// secure returns credentials with mutual TLS, as daemons use it.
func secure(t testing.TB) pair {
	t.Helper()
	files := issue(t, t.TempDir())
	client, err := files.Client("127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	return pair{files.Server(), client}
}

// eachWay runs a test without TLS and with it.
func eachWay(t *testing.T, run func(t *testing.T, w pair)) {
	t.Helper()
	t.Run("plaintext", func(t *testing.T) { run(t, plaintext()) })
	t.Run("TLS", func(t *testing.T) { run(t, secure(t)) })
}

// echo answers each range with a run whose bytes are the low byte of its offset. The metadata "how" of the call says
// how the lane ends.
func echo(s serverStream) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	how := ""
	if values := md.Get("how"); len(values) == 1 {
		how = values[0]
	}
	if how == "refuse" {
		st, err := status.New(codes.PermissionDenied, "nö, 100 %").WithDetails(&migratedv1.MigrationError{Reason: refusal})
		if err != nil {
			return err
		}
		return st.Err()
	}
	if err := s.Accept(); err != nil {
		return err
	}
	var request pagewire.Request
	var reply pagewire.Reply
	for {
		err := s.Recv(&request)
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
			if err := s.Send(&reply); err != nil {
				return err
			}
		}
	}
}

type pageService struct {
	migratedv1.UnimplementedPageServiceServer
}

func (pageService) Fetch(s grpc.BidiStreamingServer[migratedv1.FetchRequest, migratedv1.FetchResponse]) error {
	return echo(pagewire.ServerStream{ServerStream: s})
}

// serve serves the page service. If apart is set, a Server takes the lanes, otherwise all calls go to gRPC's library,
// as with old sources.
func serve(
	t testing.TB, creds credentials.TransportCredentials, apart bool, handle func(*Stream) error,
) (address string, lanes *Server) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return listener.Addr().String(), serveAt(t, listener, creds, apart, handle)
}

func serveAt(
	t testing.TB, listener net.Listener, creds credentials.TransportCredentials, apart bool, handle func(*Stream) error,
) (lanes *Server) {
	t.Helper()
	lanes = NewServer(handle, nil)
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
	return lanes
}

func open(t testing.TB, address string, creds credentials.TransportCredentials, md metadata.MD) (*Client, error) {
	t.Helper()
	c, err := Dial(t.Context(), address, creds, nil)
	if err != nil {
		t.Fatal(err)
	}
	return Open(t.Context(), c, md)
}

func openCommon(
	t testing.TB, address string, creds credentials.TransportCredentials, md metadata.MD,
) (pagewire.ClientStream, error) {
	t.Helper()
	conn, err := grpc.NewClient(
		"passthrough:///"+address, append(pagewire.DialOptions(), grpc.WithTransportCredentials(creds))...,
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stream, err := migratedv1.NewPageServiceClient(conn).Fetch(metadata.NewOutgoingContext(t.Context(), md))
	if err == nil {
		_, err = stream.Header()
	}
	return pagewire.ClientStream{ClientStream: stream}, err
}

// fetch requests a run and compares the reply.
func fetch(t testing.TB, s clientStream, offset uint64, length uint32) {
	t.Helper()
	if err := s.Send(&pagewire.Request{Ranges: []pagewire.Range{{Block: 3, Offset: offset, Length: length}}}); err != nil {
		t.Fatal(err)
	}
	expect(t, s, offset, length)
}

func expect(t testing.TB, s clientStream, offset uint64, length uint32) {
	t.Helper()
	var reply pagewire.Reply
	if err := s.Recv(&reply); err != nil {
		t.Fatal(err)
	}
	if len(reply.Runs) != 1 || reply.Runs[0].Offset != offset || reply.Runs[0].Length != length ||
		!bytes.Equal(reply.Data, bytes.Repeat([]byte{byte(offset)}, int(length))) {
		t.Fatalf("%d bytes at %d were asked for; %d came, of %v", length, offset, len(reply.Data), reply.Runs)
	}
	reply.Release()
}

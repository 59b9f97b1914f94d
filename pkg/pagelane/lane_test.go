// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/mtls"
	"github.com/migrated-vm/migrated/pkg/mtls/mtlstest"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestInterworking: each side of this package works with the other one, and with gRPC's library.
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
				begin := func(how string) (clientStream, func() error, error) {
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

// conversation fetches runs of all sizes, and has lanes end in all ways.
func conversation(t *testing.T, begin func(how string) (clientStream, func() error, error)) {
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
		err = s.Recv(new(pagewire.Reply))
		if status.Code(err) != status.Code(want) || err.Error() != want.Error() {
			t.Errorf("the end is %v, not %v", err, want)
		}
	}
	s, _, err := begin("refuse")
	if err == nil {
		err = s.Recv(new(pagewire.Reply))
	}
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || st.Message() != "nö, 100 %" {
		t.Errorf("refused with %v", err)
	} else if details := st.Details(); len(details) != 1 ||
		details[0].(*migratedv1.MigrationError).GetReason() != refusal {
		t.Errorf("refused with the details %v", details)
	}
}

// TestGRPCBeside: connections that are no lanes go to gRPC's library, also if the client sends an empty SETTINGS frame
// and waits.
func TestGRPCBeside(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		address, _ := serve(t, w.server, true, func(s *Stream) error { return echo(s) })
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(w.client))
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
	})
}

// TestCloseEndsLanes: when the server closes, its handler and its client get an error, and Close returns after the
// handler.
func TestCloseEndsLanes(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		served := make(chan error, 1)
		address, lanes := serve(t, w.server, true, func(s *Stream) error {
			err := echo(s)
			served <- err
			return err
		})
		l, err := open(t, address, w.client, nil)
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
		if err := l.Recv(new(pagewire.Reply)); status.Code(err) != codes.Unavailable {
			t.Errorf("the client is told %v", err)
		}
		if err := l.Send(new(pagewire.Request)); !errors.Is(err, io.EOF) {
			t.Errorf("a request after that: %v", err)
		}
	})
}

// TestHandlerEndsFirst: the handler may return while another goroutine is in Recv. The client gets the error, and Recv
// returns.
func TestHandlerEndsFirst(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		received := make(chan error, 1)
		address, _ := serve(t, w.server, true, func(s *Stream) error {
			if err := s.Accept(); err != nil {
				return err
			}
			go func() { received <- s.Recv(new(pagewire.Request)) }()
			return status.Error(codes.Aborted, "withdrawn")
		})
		l, err := open(t, address, w.client, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Recv(new(pagewire.Reply)); status.Code(err) != codes.Aborted {
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
	})
}

// TestContextEndsLane: Recv returns when the context of the lane ends.
func TestContextEndsLane(t *testing.T) {
	eachWay(t, func(t *testing.T, w pair) {
		address, _ := serve(t, w.server, true, func(s *Stream) error { return echo(s) })
		c, err := Dial(t.Context(), address, w.client, nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		l, err := Open(ctx, c, nil)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- l.Recv(new(pagewire.Reply)) }()
		cancel()
		select {
		case err := <-ended:
			if err == nil {
				t.Error("a reply to nothing")
			}
		case <-time.After(patience):
			t.Error("Recv waits for ever")
		}
	})
}

func TestDialFails(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	_ = listener.Close()
	if _, err := Dial(t.Context(), address, insecure.NewCredentials(), nil); status.Code(err) != codes.Unavailable {
		t.Errorf("nobody listens: %v", err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"fmt"
	"net"
	"os"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testID, testToken = "migration-1", "secret"

func isStopped(context.Context) error { return nil }

// serve starts a gRPC server on the loopback and returns a connection to it.
func serve(t testing.TB, s *Server) *grpc.ClientConn {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(pagewire.ServerOptions()...)
	migratedv1.RegisterPageServiceServer(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return dial(t, listener.Addr().String())
}

func dial(t testing.TB, address string) *grpc.ClientConn {
	t.Helper()
	options := append(pagewire.DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient("passthrough:///"+address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// allPays is the cost of a byte, in ps, on a link of 1 kB/s. On that, all packing pays that makes anything shorter.
const allPays = 1_000_000_000

// announcing returns the context of a call on a bulk lane that announces these compressions.
func announcing(ctx context.Context, unpackable string) context.Context {
	return metadata.NewIncomingContext(ctx, metadata.Pairs(
		pagewire.CompressionKey, unpackable, pagewire.LaneKey, pagewire.BulkLane,
	))
}

// offer offers ram on a server of its own, and returns the export and a lane to it.
func offer(t testing.TB, ram *RAM, unpackable ...string) (*Export, testLane) {
	t.Helper()
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, ram, isStopped)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Withdraw)
	return e, openLane(t, serve(t, s), testID, testToken, unpackable...)
}

type testLane struct {
	migratedv1.PageService_FetchClient
}

// openLane opens a lane: a bulk lane that announces unpackable if that is given, and otherwise a demand lane.
func openLane(t testing.TB, conn *grpc.ClientConn, id, token string, unpackable ...string) testLane {
	t.Helper()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(),
		pagewire.MigrationIDKey, id, pagewire.MigrationTokenKey, token))
	for _, names := range unpackable {
		ctx = metadata.AppendToOutgoingContext(ctx, pagewire.CompressionKey, names, pagewire.LaneKey, pagewire.BulkLane)
	}
	t.Cleanup(cancel)
	stream, err := migratedv1.NewPageServiceClient(conn).Fetch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return testLane{stream}
}

// accepted waits for the header, which the server sends when it accepts the lane, before the first request.
func (l testLane) accepted(t testing.TB) testLane {
	t.Helper()
	if _, err := l.Header(); err != nil {
		t.Fatal(err)
	}
	return l
}

// fetch requests ranges, and calls got for each run of the replies, until all ranges are answered.
func (l testLane) fetch(ranges []pagewire.Range, got func(run pagewire.Run, data []byte)) error {
	return l.request(&pagewire.Request{Ranges: ranges}, got)
}

// request is fetch with a whole request. Runs that are holes do not count as answers; they come with the last one.
func (l testLane) request(request *pagewire.Request, got func(run pagewire.Run, data []byte)) error {
	if err := l.SendMsg(request); err != nil {
		return l.RecvMsg(&pagewire.Reply{}) // Recv returns why Send failed
	}
	left := uint64(0)
	for _, r := range request.Ranges {
		left += uint64(r.Length)
	}
	var reply pagewire.Reply
	defer reply.Release()
	for left > 0 {
		if err := l.RecvMsg(&reply); err != nil {
			return err
		}
		data := reply.Data
		for _, run := range reply.Runs {
			if run.Hole {
				if left > 0 {
					return fmt.Errorf("a hole comes where %d bytes are unanswered", left)
				}
				got(run, nil)
				continue
			}
			if uint64(run.Length) > left {
				return fmt.Errorf("run of %d bytes where %d are unanswered", run.Length, left)
			}
			left -= uint64(run.Length)
			if !run.Carries() {
				got(run, nil)
				continue
			}
			got(run, data[:run.Length])
			data = data[run.Length:]
		}
	}
	return nil
}

// ramFile makes a sparse file on a tmpfs. fill returns the content of a page; nil makes a hole.
func ramFile(t testing.TB, size int64, fill func(page int64) []byte) *os.File {
	t.Helper()
	f, err := os.CreateTemp("/dev/shm", "pagesrv-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		_ = os.Remove(f.Name())
	})
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for page := range size / 4096 {
		if content := fill(page); content != nil {
			if _, err := f.WriteAt(content, page*4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	return f
}

// pattern returns a page that depends on its number. An even page has one byte that is not zero, the last one. An odd
// page has no zero byte.
func pattern(page int64) []byte {
	p := make([]byte, 4096)
	if page%2 == 0 {
		p[4095] = byte(page) | 1
		return p
	}
	for i := range p {
		p[i] = byte(int64(i)*7+page*13) | 1
	}
	return p
}

// mixed fills a file with data, zeros that were written, and short and long holes.
func mixed(page int64) []byte {
	switch {
	case page%97 > 50:
		return nil
	case page%5 == 0:
		return nil
	case page%7 < 2:
		return make([]byte, 4096)
	}
	return pattern(page)
}

func openRAM(t testing.TB, blocks ...Block) *RAM {
	t.Helper()
	ram, err := OpenRAM(blocks)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ram.Close() })
	return ram
}

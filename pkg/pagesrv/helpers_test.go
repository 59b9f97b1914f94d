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

	"github.com/migrated-vm/migrated/internal/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testID, testToken = "migration-1", "secret"

func isStopped(context.Context) error { return nil }

// serve starts a gRPC server on loopback and returns a connection to it.
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

// allPays is the speed of a link on which all packing pays that makes anything shorter: 1 kB/s, in ps per byte.
const allPays = 1_000_000_000

// announcing makes a context look like that of a bulk lane that announces these compressions.
func announcing(ctx context.Context, unpackable string) context.Context {
	return metadata.NewIncomingContext(ctx, metadata.Pairs(pagewire.CompressionKey, unpackable, pagewire.LaneKey, pagewire.BulkLane))
}

// offer serves one export and returns it with a lane to it.
func offer(t testing.TB, ram *RAM, unpackable ...string) (*Export, testLane) {
	t.Helper()
	s := NewServer()
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

// openLane opens a lane that announces these compressions, then as the bulk lane.
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

// accepted waits for the header, which an accepted lane gets before it asks for anything.
func (l testLane) accepted(t testing.TB) testLane {
	t.Helper()
	if _, err := l.Header(); err != nil {
		t.Fatal(err)
	}
	return l
}

// fetch sends one request and hands over the bytes of each run of the replies, until all is answered.
func (l testLane) fetch(ranges []pagewire.Range, got func(run pagewire.Run, data []byte)) error {
	if err := l.SendMsg(&pagewire.Request{Ranges: ranges}); err != nil {
		return l.RecvMsg(&pagewire.Reply{}) // the reason
	}
	left := uint64(0)
	for _, r := range ranges {
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
			if uint64(run.Length) > left {
				return fmt.Errorf("run of %d bytes where %d are unanswered", run.Length, left)
			}
			left -= uint64(run.Length)
			if run.Zero {
				got(run, nil)
				continue
			}
			got(run, data[:run.Length])
			data = data[run.Length:]
		}
	}
	return nil
}

// ramFile makes a sparse file with the pages that fill says, in a directory of tmpfs.
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

// pattern is a page that tells its number and that has one byte at its very end or throughout.
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

// mixed has pages with data, pages that were written with zeros, and holes short and long.
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

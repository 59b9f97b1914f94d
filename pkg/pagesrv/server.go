// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// MaxLanes bounds the lanes that one export serves at a time.
const MaxLanes = 64

// Server serves the RAM of VMs: it is migrated.v1.PageService. Its gRPC server must have pagewire.ServerOptions.
type Server struct {
	migratedv1.UnimplementedPageServiceServer

	options Options

	mu      sync.Mutex // opening and ending exports and lanes, never a page
	exports map[string]*Export
	shared  shared
}

var _ migratedv1.PageServiceServer = (*Server)(nil)

// Options are the options of a Server. The zero value can be used.
type Options struct {
	// CheckProtocol returns nil if lanes that keep to this version of the protocol can be served, and otherwise why not.
	// The migration may have been begun by another release. A nil CheckProtocol accepts all versions.
	CheckProtocol func(version uint32) error
}

// NewServer returns a server that offers nothing yet.
func NewServer(o Options) *Server {
	return &Server{options: o, exports: map[string]*Export{}}
}

// SetBandwidth limits the packed bytes a second that all exports together send for pages that no thread waits for.
// Exports share it by their weights. 0: no limit.
func (s *Server) SetBandwidth(bytesPerSecond uint64) { s.shared.setRate(bytesPerSecond) }

// Offer makes the RAM of one VM fetchable under id, for peers that show token. Lanes may open at once. The first
// request for pages makes the export call stopped, which must return nil only while the VM is verifiably stopped. From
// then on the VM must stay stopped until Withdraw has returned. stopped is called with the context of a lane, and may
// be called again after it failed.
//
// The caller closes ram, after Withdraw.
func (s *Server) Offer(id, token string, ram *RAM, stopped func(context.Context) error) (*Export, error) {
	if id == "" || token == "" {
		return nil, errors.New("offer RAM: a migration needs an id and a token")
	}
	e := &Export{
		server: s, id: id, token: sha256.Sum256([]byte(token)),
		ram: ram, weight: 1, stopped: stopped, quota: newQuota(ram),
		lanes: map[*lane]struct{}{}, done: make(chan struct{}),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.exports[id]; ok {
		return nil, fmt.Errorf("offer RAM of migration %s: %w", id, ErrOffered)
	}
	s.exports[id] = e
	return e, nil
}

func (s *Server) forget(e *Export) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.id] == e {
		delete(s.exports, e.id)
	}
}

// Stream is the source's side of a lane, a call of PageService.Fetch: a *pagelane.Stream or a pagewire.ServerStream.
// One goroutine uses it.
type Stream interface {
	Context() context.Context     // has the metadata of the call
	Accept() error                // called before the first message
	Recv(*pagewire.Request) error // io.EOF: there are no more
	Send(*pagewire.Reply) error   // takes Data away
}

// An attendant is a Stream that answers PINGs only while somebody reads it. gRPC's library always reads.
type attendant interface {
	Attend() (stop func()) // see pagelane.Stream
}

// Fetch implements migrated.v1.PageService for lanes that gRPC's library carries.
func (s *Server) Fetch(stream grpc.BidiStreamingServer[migratedv1.FetchRequest, migratedv1.FetchResponse]) error {
	return s.ServeLane(pagewire.ServerStream{ServerStream: stream})
}

// ServeLane serves one lane until the peer ends it, a request is invalid, or the export is withdrawn. It sends the
// header at once, so that the peer knows that its lane was accepted before the first fault. Recv may still be waiting
// when ServeLane returns; the caller of ServeLane ends that wait.
func (s *Server) ServeLane(stream Stream) error {
	ctx := stream.Context()
	e, err := s.admit(ctx)
	if err != nil {
		return err
	}
	l, err := e.open(ctx)
	if err != nil {
		return err
	}
	if err := stream.Accept(); err != nil {
		e.close(l)
		return err
	}
	// The lane mostly waits in Recv, which ends only when this handler returns. So the lane runs in its own goroutine, and
	// this one waits for the end of the lane or for Withdraw.
	ended := make(chan error, 1)
	go func() {
		defer e.close(l)
		ended <- l.serve(ctx, stream)
	}()
	select {
	case err := <-ended:
		return err
	case <-e.done:
		return endLane(codes.Aborted, ErrWithdrawn, "")
	}
}

// admit finds the export that the call names, if the call shows its token.
func (s *Server) admit(ctx context.Context) (*Export, error) {
	id, token := one(ctx, pagewire.MigrationIDKey), one(ctx, pagewire.MigrationTokenKey)
	s.mu.Lock()
	e := s.exports[id]
	s.mu.Unlock()
	// Digests of one length are compared, also for an unknown id, so that the time tells nothing.
	shown, want := sha256.Sum256([]byte(token)), [sha256.Size]byte{}
	if e != nil {
		want = e.token
	}
	if subtle.ConstantTimeCompare(shown[:], want[:]) != 1 || e == nil {
		return nil, endLane(codes.PermissionDenied, ErrRefused, "")
	}
	if err := s.checkProtocol(one(ctx, pagewire.ProtocolKey)); err != nil {
		return nil, endLane(codes.FailedPrecondition, err, "")
	}
	return e, nil
}

// checkProtocol refuses a lane whose version of the protocol is not served.
func (s *Server) checkProtocol(shown string) error {
	if shown == "" || s.options.CheckProtocol == nil {
		return nil
	}
	v, err := strconv.ParseUint(shown, 10, 32)
	if err != nil {
		return fmt.Errorf("%s: %w", pagewire.ProtocolKey, err)
	}
	return s.options.CheckProtocol(uint32(v))
}

// one returns the value of a metadata key that must be there exactly once, or "".
func one(ctx context.Context, key string) string {
	values := metadata.ValueFromIncomingContext(ctx, key)
	if len(values) != 1 {
		return ""
	}
	return values[0]
}

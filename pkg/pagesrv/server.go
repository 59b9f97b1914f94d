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

	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// MaxLanes bounds the lanes that one export serves at a time.
const MaxLanes = 64

// Server is migrated.v1.PageService. Its gRPC server must use pagewire.ServerOptions.
type Server struct {
	migratedv1.UnimplementedPageServiceServer

	mu      sync.Mutex // opening and ending exports and lanes, never a page
	exports map[string]*Export
}

var _ migratedv1.PageServiceServer = (*Server)(nil)

// NewServer returns a server that offers nothing yet.
func NewServer() *Server {
	return &Server{exports: map[string]*Export{}}
}

// Offer makes the RAM of one VM fetchable under id by who shows token. Lanes may open at once. The
// first request for pages makes the export call stopped, which must return nil only while the VM is
// verifiably stopped; from then on the VM must stay stopped until Withdraw has returned. stopped may be
// called again after it failed, with the context of a lane.
//
// ram stays the caller's, to be closed after Withdraw.
func (s *Server) Offer(id, token string, ram *RAM, stopped func(context.Context) error) (*Export, error) {
	if id == "" || token == "" {
		return nil, errors.New("offer RAM: a migration needs an id and a token")
	}
	e := &Export{
		server: s, id: id, token: sha256.Sum256([]byte(token)),
		ram: ram, stopped: stopped, greed: newGreed(ram),
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

// Stream is a call of PageService.Fetch: gRPC's, or a *pagelane.Stream.
type Stream interface {
	messageStream
	Context() context.Context
	SendHeader(metadata.MD) error
}

// Fetch implements migrated.v1.PageService for lanes that come through gRPC.
func (s *Server) Fetch(stream grpc.BidiStreamingServer[migratedv1.FetchRequest, migratedv1.FetchResponse]) error {
	return s.ServeLane(stream)
}

// ServeLane serves one lane until the peer ends it, a request is invalid, or the export is withdrawn. It
// sends the header at once, so that the peer knows that its lane was accepted before the first fault. RecvMsg may still
// be waiting when it returns; whoever called it ends that wait.
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
	if err := stream.SendHeader(nil); err != nil {
		e.close(l)
		return err
	}
	// The lane waits in RecvMsg most of the time, and only the end of this handler ends that wait. So the lane has a
	// goroutine of its own, and this one waits for whichever end comes first.
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
	// Digests are compared, of one length, also for an id that is unknown: the time says nothing.
	shown, want := sha256.Sum256([]byte(token)), [sha256.Size]byte{}
	if e != nil {
		want = e.token
	}
	if subtle.ConstantTimeCompare(shown[:], want[:]) != 1 || e == nil {
		return nil, endLane(codes.PermissionDenied, ErrRefused, "")
	}
	if err := checkProtocol(one(ctx, pagewire.ProtocolKey)); err != nil {
		return nil, endLane(codes.FailedPrecondition, err, "")
	}
	return e, nil
}

// checkProtocol refuses a lane that keeps to a protocol that this daemon does not speak: the migration was begun by another
// version of it, which can go on with it.
func checkProtocol(shown string) error {
	if shown == "" {
		return nil
	}
	v, err := strconv.ParseUint(shown, 10, 32)
	if err != nil {
		return fmt.Errorf("%s: %w", pagewire.ProtocolKey, err)
	}
	return version.CheckProtocol("the destination", uint32(v))
}

// one returns the value of a metadata key that must be there exactly once, or "".
func one(ctx context.Context, key string) string {
	values := metadata.ValueFromIncomingContext(ctx, key)
	if len(values) != 1 {
		return ""
	}
	return values[0]
}

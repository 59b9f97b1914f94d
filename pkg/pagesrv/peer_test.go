// SPDX-License-Identifier: Apache-2.0

package pagesrv

import (
	"bytes"
	"context"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestPlainGRPCClient: any gRPC program can fetch pages. This one uses the generated messages and gRPC's own codec.
func TestPlainGRPCClient(t *testing.T) {
	s := NewServer(Options{})
	e, err := s.Offer(testID, testToken, smallRAM(t), isStopped)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Withdraw()
	conn, err := grpc.NewClient(serve(t, s).Target(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(t.Context(),
		pagewire.MigrationIDKey, testID, pagewire.MigrationTokenKey, testToken))
	defer cancel()
	lane, err := migratedv1.NewPageServiceClient(conn).Fetch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const pages = 20 // so many that a reply takes more than one HTTP/2 frame
	if err := lane.Send(&migratedv1.FetchRequest{
		Ranges: []*migratedv1.PageRange{{Offset: 3 * 4096, Length: pages * 4096}},
	}); err != nil {
		t.Fatal(err)
	}
	reply, err := lane.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for page := range int64(pages) {
		want = append(want, pattern(3+page)...)
	}
	if len(reply.GetRuns()) != 1 || reply.GetRuns()[0].GetOffset() != 3*4096 || !bytes.Equal(reply.GetData(), want) {
		t.Errorf("%d bytes in runs %v", len(reply.GetData()), reply.GetRuns())
	}
}

// TestWithdrawWhilePeerDoesNotRead: a peer that sends requests and never reads blocks its lane in Send. That must not
// block Withdraw.
func TestWithdrawWhilePeerDoesNotRead(t *testing.T) {
	e, lane := offer(t, smallRAM(t))
	request := &pagewire.Request{}
	for range pagewire.MaxRequestedBytes >> 20 {
		request.Ranges = append(request.Ranges, pagewire.Range{Length: 1 << 20})
	}
	for range 2 { // so many that all buffers on the way are full
		if err := lane.SendMsg(request); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the windows to fill", func() bool { return e.Stats().Bytes >= 16<<20 })
	e.Withdraw()
	eventually(t, "the lane to end", func() bool { return e.Stats().Lanes == 0 })
	// The peer may still get what was sent before. Then it gets the reason.
	var reply pagewire.Reply
	defer reply.Release()
	var err error
	for range 2 * pagewire.MaxRequestedBytes >> 12 {
		if err = lane.RecvMsg(&reply); err != nil {
			break
		}
	}
	wantCode(t, err, codes.Aborted, ErrWithdrawn.Error())
}

// TestMalformedRequestEndsTheLane: a message that is no valid request ends the lane.
func TestMalformedRequestEndsTheLane(t *testing.T) {
	_, lane := offer(t, smallRAM(t))
	many := &migratedv1.FetchRequest{}
	for range pagewire.MaxRanges + 1 {
		many.Ranges = append(many.Ranges, &migratedv1.PageRange{Length: 4096})
	}
	if err := lane.Send(many); err != nil {
		t.Fatal(err)
	}
	wantCode(t, lane.RecvMsg(&pagewire.Reply{}), codes.Internal, pagewire.ErrMalformed.Error())
}

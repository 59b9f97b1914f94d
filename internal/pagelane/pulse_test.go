// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// TestSilentSource: one that takes requests and PINGs and says nothing ends the lane, which says why. So does one that waits for
// the rest of a message, because that is what its client waits for, too.
func TestSilentSource(t *testing.T) {
	for name, last := range map[string][]byte{"nothing": nil, "the beginning of a message": {0, 0, 1, 0, 0, 1, 2, 3}} {
		t.Run(name, func(t *testing.T) {
			got := clientOf(t, 20*time.Millisecond, takeOne, func(p *rawPeer) {
				p.must(writeHeaders(p.Framer, false, acceptance...))
				if last != nil {
					p.must(p.WriteData(stream, false, last))
				}
			})
			select {
			case err := <-got:
				if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not answered") {
					t.Errorf("the client says %v", err)
				}
			case <-time.After(patience):
				t.Error("the client waits for ever")
			}
		})
	}
}

// TestQuietLaneLives: a lane that carries nothing stays open, asked again and again.
func TestQuietLaneLives(t *testing.T) {
	conn, err := Dial(t.Context(), echoServer(t), insecure.NewCredentials())
	if err != nil {
		t.Fatal(err)
	}
	l, err := openWith(t.Context(), conn, nil, 20*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	var reply pagewire.Reply
	got := make(chan error, 1)
	go func() { got <- l.RecvMsg(&reply) }()
	for deadline := time.Now().Add(patience); l.pulse.acks.Load() < 5; time.Sleep(time.Millisecond) {
		select {
		case err := <-got:
			t.Fatalf("it ends with %v", err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the server does not answer")
		}
	}
	if err := l.SendMsg(&pagewire.Request{Ranges: []pagewire.Range{{Offset: 9, Length: 4096}}}); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil || len(reply.Data) != 4096 {
		t.Fatal(err)
	}
}

// TestBusyReceiverLives: one that deals with what came for long hears no answers, and is no reason to end the lane.
func TestBusyReceiverLives(t *testing.T) {
	beats, ended := 0, false
	p := newPulse(time.Hour, func() error { beats++; return nil }, func() { ended = true })
	defer p.stop()
	p.idle.Store(true)
	for range 3 {
		p.beat()
	}
	if beats != 3 || ended {
		t.Errorf("%d PINGs, ended %t", beats, ended)
	}
	p.idle.Store(false)
	if p.beat(); !ended {
		t.Error("one that waits for an answer in vain is not ended")
	}
}

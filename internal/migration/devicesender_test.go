// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"bytes"
	"errors"
	"io"
	"testing"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A blockingStream is a stream whose Send blocks until the test says what becomes of the message.
type blockingStream struct {
	deviceStream

	asked chan struct{} // Send was called
	next  chan error    // what Send returns
	got   []byte
}

func (s *blockingStream) Send(m *migratedv1.LoadDeviceStateRequest) error {
	s.asked <- struct{}{}
	err := <-s.next
	if err == nil {
		s.got = append(s.got, m.GetData()...)
	}
	return err
}

// Saving never waits for a destination that does not read, and every byte is sent once.
func TestDeviceSender(t *testing.T) {
	body := make([]byte, 3*deviceChunk+100)
	for i := range body {
		body[i] = byte(i * 7 >> 3)
	}
	s := &blockingStream{asked: make(chan struct{}), next: make(chan error)}
	d := newDeviceSender(s)
	d.offer(nil)
	d.offer(body[:10])
	<-s.asked // it does not read
	for n := range deviceChunk + 10 {
		d.offer(body[:10+n])
	}
	close(d.offers)
	go func() {
		s.next <- nil
		for range s.asked {
			s.next <- nil
		}
	}()
	<-d.idle
	if got := len(s.got); got != deviceChunk+19 {
		t.Errorf("%d bytes were sent of those that were offered", got)
	}
	d.send(body)
	close(s.asked)
	if d.err != nil || d.callEnded || !bytes.Equal(s.got, body) {
		t.Errorf("%d of %d bytes were sent: %v, over: %t", len(s.got), len(body), d.err, d.callEnded)
	}
}

// A destination that ended the call says why when it is asked. A broken connection is the error itself.
func TestDeviceSenderFails(t *testing.T) {
	broken := errors.New("broken")
	for name, fails := range map[string]error{"the destination ended the call": io.EOF, "broken": broken} {
		t.Run(name, func(t *testing.T) {
			s := &blockingStream{asked: make(chan struct{}), next: make(chan error)}
			d := newDeviceSender(s)
			d.offer(make([]byte, 2*deviceChunk))
			<-s.asked
			s.next <- fails
			d.offer(make([]byte, 3*deviceChunk))
			close(d.offers)
			<-d.idle
			d.send(make([]byte, 4*deviceChunk)) // nothing more
			if d.sent != 0 || d.callEnded != errors.Is(fails, io.EOF) || errors.Is(d.err, broken) != errors.Is(fails, broken) {
				t.Errorf("%d bytes sent, over: %t, %v", d.sent, d.callEnded, d.err)
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// serialPoll is how often the end of a serial log is read again: much shorter than a window of the guest's.
const serialPoll = 2 * time.Millisecond

// serial reads what the guest says on whichever host it runs. A line may begin on one host and end on the other.
type serial struct {
	ctx   context.Context //nolint:containedctx // io.Reader has none
	files map[*lab.Host]*os.File
	now   *os.File
	next  atomic.Pointer[os.File] // the file to read when now is at its end
}

// followSerial reads the guest's reports into log until ctx ends, from host a first.
func followSerial(ctx context.Context, l *lab.Lab, log *report.Log) (*serial, error) {
	s := &serial{ctx: ctx, files: map[*lab.Host]*os.File{}}
	for _, h := range l.Hosts() {
		f, err := os.OpenFile(h.Path(lab.SerialLog), os.O_CREATE|os.O_RDONLY, 0o666)
		if err != nil {
			return nil, err
		}
		s.files[h] = f
	}
	s.now = s.files[l.A]
	s.next.Store(s.now)
	go func() {
		defer func() {
			for _, f := range s.files {
				_ = f.Close() // was only read
			}
		}()
		_ = log.Follow(s) // it ends with ctx; a caller that waits for missing lines gets the error
	}()
	return s, nil
}

// follow tells s that the guest runs on h now.
func (s *serial) follow(h *lab.Host) { s.next.Store(s.files[h]) }

func (s *serial) Read(p []byte) (int, error) {
	for {
		next := s.next.Load() // loaded before the read: the old host wrote all its text before follow
		n, err := s.now.Read(p)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if next != s.now {
			s.now = next
			continue
		}
		select {
		case <-time.After(serialPoll):
		case <-s.ctx.Done():
			return 0, context.Cause(s.ctx)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"

	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// plainLane is a lane over bare TCP to source.servePlain. It shows how long a fault would take without gRPC. It carries
// single pages of one block, so it serves faults but not the sweep.
type plainLane struct {
	destination // of its wire only the requests are used, which keep the order of what was asked for
	conn        net.Conn
	in          *bufio.Reader
	out         []byte
	asked       []pagewire.Range // the part of the oldest request that is not answered yet
	page        []byte
}

func plainLanes(ctx context.Context, address string) (*lanes, error) {
	ctx, cancel := context.WithCancel(ctx)
	l := &lanes{close: cancel}
	for range workers + 1 {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			cancel()
			return nil, err
		}
		w := newWire(ctx)
		context.AfterFunc(w.ctx, func() { _ = conn.Close() }) // CloseSend ends the wire
		l.add(&plainLane{
			destination: destination{wire: w}, conn: conn, in: bufio.NewReader(conn), page: make([]byte, pageSize),
		})
	}
	return l, nil
}

func (l *plainLane) Send(request *pagewire.Request) error {
	l.out = l.out[:0]
	for _, r := range request.Ranges {
		for o := uint64(0); o < uint64(r.Length); o += pageSize {
			l.out = binary.NativeEndian.AppendUint64(l.out, r.Offset+o)
			l.out = binary.NativeEndian.AppendUint64(l.out, 0)
		}
	}
	if err := l.destination.Send(request); err != nil {
		return err
	}
	_, err := l.conn.Write(l.out)
	return err
}

// Recv waits for a page, and only then looks up which page it is: its request is in the channel by then.
func (l *plainLane) Recv(reply *pagewire.Reply) (err error) {
	if _, err := io.ReadFull(l.in, l.page); err != nil {
		return err
	}
	if len(l.asked) == 0 {
		if l.asked, err = take(l.ctx, l.requests); err != nil {
			return err
		}
	}
	r := &l.asked[0]
	reply.Runs = append(reply.Runs[:0], pagewire.Run{Block: r.Block, Offset: r.Offset, Length: pageSize})
	reply.Data = l.page
	r.Offset, r.Length = r.Offset+pageSize, r.Length-pageSize
	if r.Length == 0 {
		l.asked = l.asked[1:]
	}
	return nil
}

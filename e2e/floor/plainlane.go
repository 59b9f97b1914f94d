// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"

	"github.com/migrated-vm/migrated/internal/pagewire"
)

// plainLane is a lane over bare TCP to source.servePlain: what a fault would take if there were no gRPC. It carries
// single pages of one block, so it is good for faults and not for the sweep.
type plainLane struct {
	destination // of its wire only the requests are used: they remember what was asked for, in order
	conn        net.Conn
	in          *bufio.Reader
	out         []byte
	asked       []pagewire.Range // not answered yet, of the oldest request
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
		l.add(&plainLane{destination: destination{wire: w}, conn: conn, in: bufio.NewReader(conn), page: make([]byte, pageSize)})
	}
	return l, nil
}

func (l *plainLane) SendMsg(m any) error {
	l.out = l.out[:0]
	for _, r := range m.(*pagewire.Request).Ranges {
		for o := uint64(0); o < uint64(r.Length); o += pageSize {
			l.out = binary.NativeEndian.AppendUint64(l.out, r.Offset+o)
			l.out = binary.NativeEndian.AppendUint64(l.out, 0)
		}
	}
	if err := l.destination.SendMsg(m); err != nil {
		return err
	}
	_, err := l.conn.Write(l.out)
	return err
}

// RecvMsg waits for a page, and only then looks up which one it is: what was asked for is there by then.
func (l *plainLane) RecvMsg(m any) (err error) {
	if _, err := io.ReadFull(l.in, l.page); err != nil {
		return err
	}
	if len(l.asked) == 0 {
		if l.asked, err = take(l.ctx, l.requests); err != nil {
			return err
		}
	}
	r := &l.asked[0]
	reply := m.(*pagewire.Reply)
	reply.Runs = append(reply.Runs[:0], pagewire.Run{Block: r.Block, Offset: r.Offset, Length: pageSize})
	reply.Data = l.page
	r.Offset, r.Length = r.Offset+pageSize, r.Length-pageSize
	if r.Length == 0 {
		l.asked = l.asked[1:]
	}
	return nil
}

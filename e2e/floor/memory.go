// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// depth is how many messages are on their way in a lane without gRPC: the sweep's window is 8 runs.
const depth = 16

// wire is a lane without gRPC: two channels, and buffers that go around.
type wire struct {
	ctx      context.Context //nolint:containedctx // it is the life of this struct
	cancel   context.CancelFunc
	requests chan []pagewire.Range
	replies  chan *parcel
	free     chan *parcel
}

type parcel struct {
	runs []pagewire.Run
	data []byte
}

func newWire(ctx context.Context) *wire {
	ctx, cancel := context.WithCancel(ctx)
	w := &wire{ctx, cancel, make(chan []pagewire.Range, depth), make(chan *parcel, depth), make(chan *parcel, depth)}
	for range depth {
		w.free <- &parcel{}
	}
	return w
}

// take receives from a channel of the wire for as long as it lives.
func take[T any](ctx context.Context, c <-chan T) (v T, err error) {
	select {
	case v = <-c:
		return v, nil
	case <-ctx.Done():
		return v, io.EOF
	}
}

// destination is the engine's end of a wire.
type destination struct {
	postcopy.Lane
	*wire
	held *parcel // what the reply received last refers to
}

// CloseSend ends the lane: the engine sends no request after it and waits for no answer.
func (d *destination) CloseSend() error {
	d.cancel()
	return nil
}

func (d *destination) SendMsg(m any) error {
	ranges := append([]pagewire.Range(nil), m.(*pagewire.Request).Ranges...)
	select {
	case d.requests <- ranges:
		return nil
	case <-d.ctx.Done():
		return io.EOF
	}
}

func (d *destination) RecvMsg(m any) (err error) {
	if d.held != nil {
		d.free <- d.held
	}
	if d.held, err = take(d.ctx, d.replies); err != nil {
		return err
	}
	r := m.(*pagewire.Reply)
	r.Runs, r.Data = append(r.Runs[:0], d.held.runs...), d.held.data
	return nil
}

// origin is the page server's end.
type origin struct {
	grpc.BidiStreamingServer[migratedv1.FetchRequest, migratedv1.FetchResponse]
	*wire
}

func (o *origin) Context() context.Context     { return o.ctx }
func (o *origin) SendHeader(metadata.MD) error { return nil }

func (o *origin) RecvMsg(m any) (err error) {
	m.(*pagewire.Request).Ranges, err = take(o.ctx, o.requests)
	return err
}

// SendMsg copies the page bytes once, as gRPC's transport would: they stay the page server's.
func (o *origin) SendMsg(m any) error {
	p, err := take(o.ctx, o.free)
	if err != nil {
		return err
	}
	r := m.(*pagewire.Reply)
	p.runs, p.data = append(p.runs[:0], r.Runs...), append(p.data[:0], r.Data...)
	o.replies <- p
	return nil
}

func memoryLanes(ctx context.Context, server *pagesrv.Server, blocks int) *lanes {
	ctx, cancel := context.WithCancel(metadata.NewIncomingContext(ctx, calling(blocks)))
	l := &lanes{close: cancel}
	for range workers + 1 {
		w := newWire(ctx)
		go func() { _ = server.Fetch(&origin{wire: w}) }()
		l.add(&destination{wire: w})
	}
	return l
}

// instant is a lane that has the answer to everything.
type instant struct {
	destination
	content []byte
}

func (i *instant) RecvMsg(m any) error {
	ranges, err := take(i.ctx, i.requests)
	if err != nil {
		return err
	}
	r := m.(*pagewire.Reply)
	r.Runs, r.Data = r.Runs[:0], nil
	bytes := 0
	for _, g := range ranges {
		r.Runs = append(r.Runs, pagewire.Run{Block: g.Block, Offset: g.Offset, Length: g.Length})
		bytes += int(g.Length)
	}
	r.Data = i.content[:bytes]
	return nil
}

func instantLanes(ctx context.Context) *lanes {
	ctx, cancel := context.WithCancel(ctx)
	l := &lanes{close: cancel}
	content := bytes.Repeat([]byte{0xA5}, pagewire.MaxData)
	for range workers + 1 {
		l.add(&instant{destination{wire: newWire(ctx)}, content})
	}
	return l
}

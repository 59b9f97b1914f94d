// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"io"

	"google.golang.org/grpc/metadata"

	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
)

// depth is how many messages are in flight in a lane without gRPC: the sweep's largest window, 16 MiB, in its smallest
// runs, 64 KiB. One thread both asks for runs and receives them, so asking must never block.
const depth = 256

// wire is a lane without gRPC: channels, and buffers that are reused.
type wire struct {
	ctx      context.Context //nolint:containedctx // it ends the lane
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

// take receives from a channel of the wire until the wire ends, and then returns io.EOF.
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
	held *parcel // the data of the reply that was received last
}

// CloseSend ends the lane. The engine sends no request after it and waits for no answer.
func (d *destination) CloseSend() error {
	d.cancel()
	return nil
}

func (d *destination) Send(request *pagewire.Request) error {
	ranges := append([]pagewire.Range(nil), request.Ranges...)
	select {
	case d.requests <- ranges:
		return nil
	case <-d.ctx.Done():
		return io.EOF
	}
}

func (d *destination) Recv(r *pagewire.Reply) (err error) {
	if d.held != nil {
		d.free <- d.held
	}
	if d.held, err = take(d.ctx, d.replies); err != nil {
		return err
	}
	r.Runs, r.Data = append(r.Runs[:0], d.held.runs...), d.held.data
	return nil
}

// origin is the page server's end.
type origin struct{ *wire }

func (o origin) Context() context.Context { return o.ctx }
func (o origin) Accept() error            { return nil }

func (o origin) Recv(request *pagewire.Request) (err error) {
	request.Ranges, err = take(o.ctx, o.requests)
	return err
}

// Send copies the page bytes once, as a transport would, because they belong to the page server.
func (o origin) Send(r *pagewire.Reply) error {
	p, err := take(o.ctx, o.free)
	if err != nil {
		return err
	}
	p.runs, p.data = append(p.runs[:0], r.Runs...), append(p.data[:0], r.Data...)
	o.replies <- p
	return nil
}

func memoryLanes(ctx context.Context, server *pagesrv.Server, blocks int) *lanes {
	ctx, cancel := context.WithCancel(ctx)
	l := &lanes{close: cancel}
	for i := range workers + 1 {
		w := newWire(metadata.NewIncomingContext(ctx, calling(blocks, i == workers)))
		go func() { _ = server.ServeLane(origin{wire: w}) }()
		l.add(&destination{wire: w})
	}
	return l
}

// instant is a lane that answers each request by itself.
type instant struct {
	destination
	content []byte
}

func (i *instant) Recv(r *pagewire.Reply) error {
	ranges, err := take(i.ctx, i.requests)
	if err != nil {
		return err
	}
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

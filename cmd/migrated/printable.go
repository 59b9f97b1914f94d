// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/printable"
)

// What a daemon answers holds text that others chose: the name of a VM, what a QEMU says. It is made fit for a terminal
// where it is received, so that no command can forget to. JSON escapes by itself.

func (a *app) fit(answer any) {
	if m, ok := answer.(proto.Message); ok && !a.json {
		printable.Message(m)
	}
}

// readAnswer is a grpc.UnaryClientInterceptor.
func (a *app) readAnswer(
	ctx context.Context, method string, request, answer any, cc *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	err := call(ctx, method, request, answer, cc, opts...)
	if err == nil {
		a.fit(answer)
	}
	return err
}

// readStream is a grpc.StreamClientInterceptor.
func (a *app) readStream(
	ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &fitStream{stream, a}, nil
}

type fitStream struct {
	grpc.ClientStream
	app *app
}

func (s *fitStream) RecvMsg(answer any) error {
	err := s.ClientStream.RecvMsg(answer)
	if err == nil {
		s.app.fit(answer)
	}
	return err
}

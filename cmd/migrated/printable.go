// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/printable"
)

// escape escapes the strings of an answer for a terminal. They may be text from others, such as the name of a VM or a
// message of QEMU. It is called where answers are received, so that no command can forget it. JSON escapes by itself.
func (a *app) escape(answer any) {
	if m, ok := answer.(proto.Message); ok && !a.json {
		printable.Message(m)
	}
}

// readAnswer is a grpc.UnaryClientInterceptor that escapes answers.
func (a *app) readAnswer(
	ctx context.Context, method string, request, answer any, cc *grpc.ClientConn, call grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	err := call(ctx, method, request, answer, cc, opts...)
	if err == nil {
		a.escape(answer)
	}
	return err
}

// readStream is a grpc.StreamClientInterceptor that escapes answers.
func (a *app) readStream(
	ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer,
	opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &escapingStream{stream, a}, nil
}

type escapingStream struct {
	grpc.ClientStream
	app *app
}

func (s *escapingStream) RecvMsg(answer any) error {
	err := s.ClientStream.RecvMsg(answer)
	if err == nil {
		s.app.escape(answer)
	}
	return err
}

// SPDX-License-Identifier: Apache-2.0

package pagewire

import "google.golang.org/grpc"

// ClientStream is a lane that gRPC's library carries, as its client has it. The connection must have DialOptions.
type ClientStream struct{ grpc.ClientStream }

// Send sends a request. The error io.EOF says that the call is over, and Recv returns why.
func (s ClientStream) Send(request *Request) error { return s.SendMsg(request) }

// Recv receives a reply, whose Data is valid until the next call with it, or its Release.
func (s ClientStream) Recv(reply *Reply) error { return s.RecvMsg(reply) }

// ServerStream is a lane that gRPC's library carries, as its server has it. The server must have ServerOptions.
type ServerStream struct{ grpc.ServerStream }

// Accept accepts the lane. Call it before the first message.
func (s ServerStream) Accept() error { return s.SendHeader(nil) }

// Recv receives a request. The error io.EOF says that the client has no more.
func (s ServerStream) Recv(request *Request) error { return s.RecvMsg(request) }

// Send sends a reply, and takes its Data away.
func (s ServerStream) Send(reply *Reply) error { return s.SendMsg(reply) }

// SPDX-License-Identifier: Apache-2.0

package pagewire

import "google.golang.org/grpc"

const (
	// window is how much a lane may have in flight, in bytes: 10 Gbit/s at a round trip of 13 ms. It is
	// fixed, because a window that gRPC estimates costs a ping for each burst of replies.
	window = 16 << 20
	// serverWindow is how much a call may send to a server that does not read: a hundred requests for pages, or a device
	// state. The server buffers no more.
	serverWindow = 256 << 10
	// ioBuffer is gathered before a write to the socket, and read at once from it.
	ioBuffer = 128 << 10
)

// ServerOptions returns the options of a gRPC server that serves lanes, and any other service beside them.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(Codec{}),
		grpc.StaticStreamWindowSize(serverWindow),
		grpc.StaticConnWindowSize(serverWindow),
		grpc.WriteBufferSize(ioBuffer),
		grpc.ReadBufferSize(ioBuffer),
	}
}

// DialOptions returns the options of the connection of a lane, and of any other call. Each lane should have a
// connection of its own: on a shared one, a lane waits for the bytes of the others.
//
// Retries are off: gRPC would keep every sent message until the first reply, and a lane that breaks is
// opened again by its owner, who knows what is still missing.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(Codec{})),
		grpc.WithDisableRetry(),
		grpc.WithStaticStreamWindowSize(window),
		grpc.WithStaticConnWindowSize(window),
		grpc.WithWriteBufferSize(ioBuffer),
		grpc.WithReadBufferSize(ioBuffer),
	}
}

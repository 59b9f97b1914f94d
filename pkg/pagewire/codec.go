// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// Codec is gRPC's protobuf codec, except that it reads and writes *Request and *Reply itself. It passes all other
// messages to gRPC's own codec, so a server that uses it can serve any service. ServerOptions and DialOptions have it.
//
// gRPC turns a decoding error into a status with codes.Internal whose message holds the error's text.
type Codec struct{}

var _ encoding.CodecV2 = Codec{}

var generic = encoding.GetCodecV2(proto.Name)

// Name returns the name of gRPC's protobuf codec, because the bytes on the wire are the same.
func (Codec) Name() string { return proto.Name }

// Marshal implements encoding.CodecV2. It takes the Data of a *Reply away, except when it fails.
func (Codec) Marshal(message any) (mem.BufferSlice, error) {
	switch m := message.(type) {
	case *Request:
		return passed(encodeRequest(m))
	case *Reply:
		return passed(encodeReply(m))
	default:
		return generic.Marshal(message)
	}
}

func passed(e Encoded, err error) (mem.BufferSlice, error) {
	if err != nil {
		return nil, err
	}
	return e.frame.pass(e.Bytes[Room:]), nil
}

// Unmarshal implements encoding.CodecV2. Errors about a *Request or a *Reply are ErrMalformed.
func (Codec) Unmarshal(data mem.BufferSlice, message any) error {
	switch m := message.(type) {
	case *Request:
		return decodeRequest(newCursor(data), m)
	case *Reply:
		return decodeReply(newCursor(data), m)
	default:
		return generic.Unmarshal(data, message)
	}
}

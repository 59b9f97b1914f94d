// SPDX-License-Identifier: Apache-2.0

// Package pagelane carries a lane: one call of PageService.Fetch on a connection of its own.
//
// It is gRPC over HTTP/2, and works with any gRPC program at the other end. But the goroutines that use the lane read
// and write the socket themselves. gRPC's transport has a reader and a writer goroutine at each end; each message that
// is handed from one to the other wakes a thread, and those wake-ups were most of what a fault cost
// (docs/fault-budget.md). With one call on the connection nothing has to be multiplexed:
//
//	destination                                     source
//	fault worker ── Send ──► write(2) ──► read(2) ── Recv ──► lane: reads the pages
//	receiver ◄── Recv ── read(2) ◄── write(2) ◄── Send ─────────┘
//
// A message is one write(2) and one HTTP/2 frame, as long as the peer takes frames of that size, and is read into one
// piece of memory, from which it is installed. Nothing is allocated for a message. conn.go draws which function calls
// which in Send and in Recv.
//
// # How a server recognizes a lane
//
// The client's first SETTINGS frame has the setting laneSetting. No other client sends it, and a server that does not
// know it has to ignore it (RFC 9113, 6.5.2). Server looks for it after the TLS handshake, on connections that gRPC's
// own listener accepted. It serves those that have it and leaves all others to gRPC. So old destinations and other gRPC
// programs fetch pages from the same port through gRPC, and old sources serve the client of this package.
//
// # TLS
//
// crypto/tls encrypts and decrypts. records.go makes it write all records of a message at once, and gives it as many
// records to read as are there. So with TLS, too, a message takes few system calls and nothing is allocated for it. The
// only added cost is the cipher.
//
// # Supported parts of HTTP/2
//
// Flow control is obeyed. For replies the windows have their maximum size, because with one call on a connection TCP's
// flow control is enough. golang.org/x/net/http2 reads and writes HEADERS, SETTINGS, PING, GOAWAY and the like. This
// package itself handles DATA, which is all but the first and the last frame of a lane. A second stream is refused.
// There is no compression by gRPC, and no deadline of the call.
//
// TCP finds a host that is gone. The client's PINGs find a source that hangs, or a connection on which bytes were lost
// (keepalive.go).
package pagelane

import (
	"errors"

	"golang.org/x/net/http2"
)

// ErrBroken says that the peer does not keep to HTTP/2 or gRPC. Opening the lane again does not help.
var ErrBroken = errors.New("the peer violates the HTTP/2 or gRPC protocol")

const (
	// laneSetting marks a connection that carries one lane. Its value is the version of this protocol, 1.
	laneSetting http2.SettingID = 0x6d67

	stream = 1 // the only one

	frameHeader = 9
	setting     = 6
	prefix      = 5 // of a gRPC message: not compressed, and its length

	maxRequest   = 16 << 10  // bytes of a message to the source; pagewire.MaxRanges ranges take less than half of it
	maxControl   = 16 << 10  // bytes of a frame that is not DATA, and of all headers
	defaultFrame = 16 << 10  // bytes of a frame unless the peer says otherwise
	largestFrame = 1<<24 - 1 // the largest possible
	firstWindow  = 1<<16 - 1 // bytes, of a stream and of a connection
	wholeWindow  = 1<<31 - 1 // the largest possible
	readBuffer   = 32 << 10  // larger pieces are read into their place
	manyPackets  = 4 << 10   // from so many bytes on, three system calls cost less than being woken for each packet
	// sendBuffer is the TCP send buffer of a lane in bytes: as much as the sweep may have in flight. It overrides
	// net.ipv4.tcp_wmem. Sent data stays in the buffer until it is acknowledged, so with Linux's own limit of 4 MiB one
	// connection carries less than 40 MiB a second over a round trip of 80 ms, and three fifths of 2 Gbit/s over one of 20
	// ms (docs/fault-budget.md). The kernel allocates twice as much, for its own needs.
	sendBuffer = 16 << 20
	maxAhead   = 32 << 20 // bytes of replies that a client with one goroutine keeps; the engine asks for half at a time
)

// SPDX-License-Identifier: Apache-2.0

// Package pagelane carries a lane: one call of PageService.Fetch on a connection of its own.
//
// It is gRPC over HTTP/2, to be had with any gRPC program at the other end, but the goroutines that use the lane read
// and write the socket themselves. gRPC's transport has a reader and a writer goroutine at each end; each message that is
// handed from one to the other wakes a thread, and those wake-ups were most of what a fault cost (docs/fault-budget.md). With one
// call on the connection there is nothing to be multiplexed:
//
//	destination                                     source
//	fault worker ── SendMsg ──► write(2) ──► read(2) ── RecvMsg ──► lane: reads the pages
//	receiver ◄── RecvMsg ── read(2) ◄── write(2) ◄── SendMsg ─────────┘
//
// A message is one write(2) and one HTTP/2 frame, as long as the peer takes frames of that size, and is read into one
// piece of memory, from which it is installed. Nothing is allocated for a message.
//
// # How a server knows
//
// The client's first SETTINGS frame has the setting laneSetting, which nobody else sends and everybody has to ignore
// (RFC 9113, 6.5.2). Server looks for it behind gRPC's own listener, once TLS is through: connections that have it it serves,
// all others it leaves to gRPC. So old destinations, and other gRPC programs, fetch pages from the same port in the common way,
// and old sources serve the client of this package.
//
// # What of HTTP/2 there is
//
// Flow control is obeyed; its windows are as large as can be for replies, because with one call on a connection TCP's own
// is enough. HEADERS, SETTINGS, PING, GOAWAY and the like are read and written by golang.org/x/net/http2; DATA, which is all but
// the first and the last frame of a lane, is by hand. A second stream is refused. There is no compression by gRPC, and no deadline
// of the call.
//
// A host that is gone is found by TCP, a source that hangs, or with which bytes were lost, by the client's PINGs (pulse.go).
package pagelane

import (
	"errors"

	"golang.org/x/net/http2"
)

// ErrBroken says that the peer does not keep to HTTP/2 or gRPC. Asking again does not mend it.
var ErrBroken = errors.New("the peer does not speak gRPC as it should")

const (
	// laneSetting marks a connection that carries one lane. Its value is the version of this package's way, 1.
	laneSetting http2.SettingID = 0x6d67

	stream = 1 // the only one

	frameHeader = 9
	setting     = 6
	prefix      = 5 // of a gRPC message: not compressed, and its length

	maxRequest   = 16 << 10  // bytes of a message to the source; one of pagewire.MaxRanges ranges has less than half
	maxControl   = 16 << 10  // bytes of a frame that is not DATA, and of all headers
	defaultFrame = 16 << 10  // bytes of a frame unless the peer says otherwise
	largestFrame = 1<<24 - 1 // that can be
	firstWindow  = 1<<16 - 1 // bytes, of a stream and of a connection
	wholeWindow  = 1<<31 - 1 // that can be
	readBuffer   = 32 << 10  // what is larger is read into its place
	manyPackets  = 4 << 10   // bytes that are worth three system calls not to be woken for each packet of them
	maxAhead     = 8 << 20   // bytes of replies that a client which is alone keeps; the engine asks for half of it at a time
)

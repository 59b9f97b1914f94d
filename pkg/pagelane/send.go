// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"encoding/binary"
	"errors"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// send writes a message as DATA. The bytes before it are those of pagewire.Room.
func (c *conn) send(room []byte) error {
	message := room[frameHeader+prefix:]
	room[frameHeader] = 0 // not compressed by gRPC
	binary.BigEndian.PutUint32(room[frameHeader+1:], uint32(len(message)))
	for len(room) > frameHeader {
		n, err := c.reserve(len(room) - frameHeader)
		if err != nil {
			return err
		}
		// The header of a later frame takes the place of bytes that were sent before.
		putHeader(room, n, 0)
		if _, err := c.Write(room[:frameHeader+n]); err != nil {
			return lost(err)
		}
		room = room[n:]
	}
	return nil
}

func putHeader(at []byte, length int, flags http2.Flags) {
	at[0], at[1], at[2] = byte(length>>16), byte(length>>8), byte(length)
	at[3], at[4] = byte(http2.FrameData), byte(flags)
	binary.BigEndian.PutUint32(at[5:], stream)
}

// writeHeaders writes all fields of the stream in one frame; last ends the stream's side.
func writeHeaders(to *http2.Framer, last bool, fields ...hpack.HeaderField) error {
	var block bytes.Buffer
	encode := hpack.NewEncoder(&block)
	for _, f := range fields {
		if err := encode.WriteField(f); err != nil {
			return err
		}
	}
	return to.WriteHeaders(http2.HeadersFrameParam{
		StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: last,
	})
}

// errSilent says that the peer neither opened its windows nor sent data for conn.patience.
var errSilent = errors.New("the peer stopped reading: it opens no flow-control window")

// reserve takes up to n bytes from the sendWindow, as much as fits into one frame. It waits until it can take some.
func (c *conn) reserve(n int) (int, error) {
	var since time.Time // since when the window has been closed
	var received uint64 // up to since
	for {
		if k := c.sendWindow.take(n); k > 0 {
			return k, nil
		}
		if err := c.side.awaitWindow(); err != nil {
			return 0, err
		}
		switch now := c.received.Load(); {
		case since.IsZero(), now-received >= leastHeard:
			since, received = time.Now(), now
		case c.patience > 0 && time.Since(since) >= c.patience:
			return 0, errSilent
		}
	}
}

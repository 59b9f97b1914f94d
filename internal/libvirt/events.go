// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
)

// What libvirt's messages begin with (rpc.rst of libvirt): the length of all, then program, version, procedure, type,
// serial and status, 32 bits each.
const (
	lengthSize = 4
	headerSize = lengthSize + 6*4
	// mostMessage is VIR_NET_MESSAGE_MAX.
	mostMessage = 32 << 20

	qemuProgram      = 0x20008087 // QEMU_PROGRAM of qemu_protocol.x
	qemuMonitorEvent = 6          // QEMU_PROC_DOMAIN_MONITOR_EVENT
)

// withDetails is a connection to libvirt on which every event of QEMU's has details: go-libvirt drops those without,
// STOP and RESUME among them, because it takes the string at their end, which may be missing, for one that never is.
type withDetails struct {
	net.Conn
	rest bytes.Buffer // of a message that was begun
}

func (c *withDetails) Read(into []byte) (int, error) {
	if c.rest.Len() == 0 {
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	return c.rest.Read(into)
}

// next reads a message.
func (c *withDetails) next() error {
	var header [headerSize]byte
	if _, err := io.ReadFull(c.Conn, header[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(header[:])
	if size < headerSize || size > mostMessage {
		return fmt.Errorf("libvirt sends a message of %d bytes", size)
	}
	body := make([]byte, size-headerSize)
	if _, err := io.ReadFull(c.Conn, body); err != nil {
		return err
	}
	field := func(i int) uint32 { return binary.BigEndian.Uint32(header[lengthSize+4*i:]) }
	if field(0) == qemuProgram && field(2) == qemuMonitorEvent && lacksDetails(body) {
		body = slices.Concat(body, make([]byte, 4)) // its length
		binary.BigEndian.PutUint32(header[:], size+4)
	}
	c.rest.Write(header[:])
	c.rest.Write(body)
	return nil
}

// lacksDetails walks through an event: a callback's number, a domain (name, UUID, number), the event's name, two words
// of seconds, one of microseconds; then whether there are details.
func lacksDetails(body []byte) bool {
	at := 4
	text := func() bool { // a string, padded to words
		if at+4 > len(body) {
			return false
		}
		size := int(binary.BigEndian.Uint32(body[at:]))
		if size < 0 || size > len(body) {
			return false
		}
		at += 4 + (size+3)/4*4
		return at <= len(body)
	}
	if !text() {
		return false
	}
	at += 16 + 4
	if !text() {
		return false
	}
	at += 8 + 4
	return at+4 == len(body)
}

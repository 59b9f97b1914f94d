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

// The header of libvirt's messages (rpc.rst of libvirt): the length of the whole message, then program, version,
// procedure, type, serial and status, 32 bits each.
const (
	lengthSize = 4
	headerSize = lengthSize + 6*4
	// mostMessage is VIR_NET_MESSAGE_MAX.
	mostMessage = 32 << 20

	qemuProgram      = 0x20008087 // QEMU_PROGRAM of qemu_protocol.x
	qemuMonitorEvent = 6          // QEMU_PROC_DOMAIN_MONITOR_EVENT
)

// withDetails is a connection to libvirt that adds empty details to events of QEMU that have none, such as STOP and
// RESUME. go-libvirt would drop these, because it does not know that the last field of an event is optional.
type withDetails struct {
	net.Conn
	rest bytes.Buffer // the part of the current message that was not read yet
}

func (c *withDetails) Read(into []byte) (int, error) {
	if c.rest.Len() == 0 {
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	return c.rest.Read(into)
}

// next reads a message into rest.
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
		body = slices.Concat(body, make([]byte, 4)) // a string of length 0
		binary.BigEndian.PutUint32(header[:], size+4)
	}
	c.rest.Write(header[:])
	c.rest.Write(body)
	return nil
}

// lacksDetails says whether an event ends after the field that says whether details follow. Before it are the number of
// a callback, a domain (name, UUID, number), the event's name, two words of seconds and one of microseconds.
func lacksDetails(body []byte) bool {
	offset := 4
	skipString := func() bool { // a string is padded to words
		if offset+4 > len(body) {
			return false
		}
		size := int(binary.BigEndian.Uint32(body[offset:]))
		if size < 0 || size > len(body) {
			return false
		}
		offset += 4 + (size+3)/4*4
		return offset <= len(body)
	}
	if !skipString() {
		return false
	}
	offset += 16 + 4
	if !skipString() {
		return false
	}
	offset += 8 + 4
	return offset+4 == len(body)
}

// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
)

// message returns a message of libvirt with that program and procedure.
func message(program, procedure uint32, body []byte) []byte {
	var out []byte
	for _, word := range []uint32{uint32(headerSize + len(body)), program, 1, procedure, 2, 0, 0} {
		out = binary.BigEndian.AppendUint32(out, word)
	}
	return append(out, body...)
}

// event returns the body of an event of QEMU of the domain "db". It has no details if details is nil.
func event(name string, details []byte) []byte {
	words := func(b []byte, values ...uint32) []byte {
		for _, v := range values {
			b = binary.BigEndian.AppendUint32(b, v)
		}
		return b
	}
	text := func(b []byte, s string) []byte {
		b = append(words(b, uint32(len(s))), s...)
		return append(b, make([]byte, (4-len(s)%4)%4)...)
	}
	b := words(nil, 7) // callback
	b = text(b, "db")
	b = words(append(b, make([]byte, 16)...), 3) // UUID, number
	b = text(b, name)
	b = words(b, 0, 1, 2) // seconds, microseconds
	if details == nil {
		return words(b, 0)
	}
	return text(words(b, 1), string(details))
}

// TestWithDetails: an event without details gets some, and nothing else is changed.
func TestWithDetails(t *testing.T) {
	stop := event("STOP", nil)
	for name, c := range map[string]struct{ sent, want []byte }{
		"an event without": {
			message(qemuProgram, qemuMonitorEvent, stop),
			message(qemuProgram, qemuMonitorEvent, append(stop, 0, 0, 0, 0)),
		},
		"an event with":       {message(qemuProgram, qemuMonitorEvent, event("RESET", []byte(`{"a": 0}`))), nil},
		"an event with zeros": {message(qemuProgram, qemuMonitorEvent, event("RESET", make([]byte, 8))), nil},
		"another procedure":   {message(qemuProgram, 1, stop), nil},
		"another program":     {message(1, qemuMonitorEvent, stop), nil},
		"an empty body":       {message(qemuProgram, qemuMonitorEvent, nil), nil},
		"a broken body":       {message(qemuProgram, qemuMonitorEvent, bytes.Repeat([]byte{0xff}, 12)), nil},
	} {
		here, there := net.Pipe()
		go func() {
			_, _ = there.Write(c.sent) // the comparison below finds what is missing
			there.Close()
		}()
		got, err := io.ReadAll(&withDetails{Conn: here})
		if c.want == nil {
			c.want = c.sent
		}
		if err != nil || !bytes.Equal(got, c.want) {
			t.Errorf("%s: %v\ngot  %x\nwant %x", name, err, got, c.want)
		}
	}
	for name, sent := range map[string][]byte{
		"too short": {0, 0, 0, 8, 0, 0, 0, 0}, "too long": bytes.Repeat([]byte{0xff}, headerSize),
	} {
		here, there := net.Pipe()
		go func() {
			_, _ = there.Write(sent)
			there.Close()
		}()
		if _, err := (&withDetails{Conn: here}).Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package pagelane

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"net"
	"reflect"
	"sync/atomic"
	"unsafe"
)

const (
	recordHeader  = 5                                // bytes: type, version, and the length of what follows
	recordPlain   = 16 << 10                         // bytes of content in a record, at most
	recordLargest = recordHeader + recordPlain + 256 // bytes of a record, at most
	fullRecord    = recordHeader + recordPlain + 17  // of TLS 1.3: behind the content, its type and the cipher's tag
	recordBatch   = 128 << 10                        // bytes of records that are written at once, at most
	recordRead    = 64 << 10                         // bytes that there is room for, at least, when records are read
	largePiece    = 2 * mostSlept                    // a read of this size shows that the kernel gathers packets
	smallPiece    = mostSlept / 2                    // a smaller read shows that it does not
)

// encrypted is the connection of a lane with TLS:
//
//	Send ──► encrypted ──► tls.Conn ──► records ──► socket ──► write(2), of many records
//	Recv ◄── tls.Conn ◄── encrypted ◄── socket ◄── poll(2), read(2), of many records
//
// By itself, a tls.Conn writes each record alone, hardly reads more than one at a time, and allocates a reader for it.
// A run of 512 KiB has 33 records. They would take as many system calls at each end, and the receiver would be woken
// for each (docs/fault-budget.md).
//
// Gathered records never wait for a later message. The tls.Conn.Write to which they belong writes them, under the lock
// that it holds. So a goroutine that writes or closes meanwhile finds the same as if nothing were gathered.
//
// Reads go straight into tls.Conn's buffer of records that it has not decrypted yet, an unexported field. Only tls.Conn
// interprets the records. If a version of Go has other fields, tls.Conn reads by itself, as usual, and
// TestNothingIsAllocated fails.
type encrypted struct {
	*tls.Conn
	records *records

	// These belong to the reader.
	raw    *bytes.Buffer // tls.Conn's: records that are not decrypted. nil: tls.Conn reads by itself
	input  *bytes.Reader // tls.Conn's: what is left of the record that was decrypted last; in raw's memory
	coming int           // bytes of content that Read has not returned and the peer will certainly send; may be below 0
	large  bool          // they come in pieces so large that being woken for each is worthwhile
}

// records is the connection that the tls.Conn of an encrypted writes to and reads from.
type records struct {
	*socket

	announced atomic.Int64 // bytes of content that a Write of encrypted has still to write, or fewer
	gathered  []byte       // belongs to the holder of the lock with which tls.Conn writes
	failed    error        // why encrypted could not read, for tls.Conn to learn; belongs to the reader
}

// rawField and inputField are where tls.Conn has these fields.
var rawField, inputField, fieldsKnown = func() (raw, input uintptr, known bool) {
	conn := reflect.TypeFor[tls.Conn]()
	r, hasRaw := conn.FieldByName("rawInput")
	i, hasInput := conn.FieldByName("input")
	known = hasRaw && hasInput && r.Type == reflect.TypeFor[bytes.Buffer]() && i.Type == reflect.TypeFor[bytes.Reader]()
	return r.Offset, i.Offset, known
}()

// laneConn returns the connection that a lane uses. c is what the handshake has made of r.
func (r *records) laneConn(c net.Conn) net.Conn {
	switch c := c.(type) {
	case *records:
		return r.socket // there is no TLS
	case *tls.Conn:
		if c.ConnectionState().Version != tls.VersionTLS13 {
			return c // its records have other lengths
		}
		e := &encrypted{Conn: c, records: r}
		if fieldsKnown {
			e.raw = (*bytes.Buffer)(unsafe.Add(unsafe.Pointer(c), rawField))
			e.input = (*bytes.Reader)(unsafe.Add(unsafe.Pointer(c), inputField))
		}
		return e
	}
	return c
}

// otherConn returns the connection for anything but a lane. c is a result of laneConn.
func otherConn(c net.Conn) net.Conn {
	if e, ok := c.(*encrypted); ok {
		return e.Conn
	}
	return c
}

// Write implements net.Conn.
func (e *encrypted) Write(p []byte) (int, error) {
	if len(p) > recordPlain && e.records.announced.CompareAndSwap(0, int64(len(p))) {
		defer e.records.announced.Store(0)
	}
	return e.Conn.Write(p)
}

// Write implements net.Conn. tls.Conn writes one record at a time, all records of its Write under one lock. Write holds
// a full record back while more are announced. If another goroutine got the lock first, its record counts as well. So
// the count is never too high, and the last record is never held back.
func (r *records) Write(record []byte) (int, error) {
	more := false
	if r.announced.Load() > 0 {
		more = r.announced.Add(fullRecord-recordPlain-int64(len(record))) > 0 && len(record) == fullRecord
	}
	if !more && len(r.gathered) == 0 {
		return r.socket.Write(record)
	}
	if r.gathered == nil {
		r.gathered = make([]byte, 0, recordBatch)
	}
	r.gathered = append(r.gathered, record...)
	if more && len(r.gathered)+fullRecord <= recordBatch {
		return len(record), nil
	}
	_, err := r.socket.Write(r.gathered)
	r.gathered = r.gathered[:0]
	if err != nil {
		return 0, err // tls.Conn writes nothing after that
	}
	return len(record), nil
}

// Read implements net.Conn.
func (r *records) Read(p []byte) (int, error) {
	if err := r.failed; err != nil {
		r.failed = nil
		return 0, err
	}
	return r.socket.Read(p)
}

// expect implements expecter. Read then sleeps until so much is there (fill).
func (e *encrypted) expect(n int) { e.coming = n }

// Read implements net.Conn.
func (e *encrypted) Read(p []byte) (int, error) {
	if e.raw != nil && e.input.Len() == 0 { // otherwise raw must not be changed
		for e.lacking() > 0 && e.records.failed == nil {
			e.records.failed = e.fill()
		}
	}
	n, err := e.Conn.Read(p)
	e.coming -= n
	return n, err
}

// lacking returns how many bytes of the next record are missing. tls.Conn checks the record, not lacking.
func (e *encrypted) lacking() int {
	have := e.raw.Bytes()
	if len(have) < recordHeader {
		return recordHeader - len(have)
	}
	whole := recordHeader + int(binary.BigEndian.Uint16(have[3:]))
	if whole > recordLargest {
		return 0
	}
	return whole - len(have)
}

// fill reads into raw. If much is still to come, and bytes have lately come in small pieces, it first sleeps until
// there is much. It does so only then, because each such sleep takes three system calls.
func (e *encrypted) fill() error {
	if sure := max(e.coming-e.raw.Len(), e.lacking()); sure >= manyPackets && !e.large {
		e.records.socket.expect(sure)
	}
	if e.raw.Cap() < 2*(recordRead+recordLargest) {
		e.raw.Grow(2 * (recordRead + recordLargest)) // so much that raw is always large enough for the next read
	}
	e.raw.Grow(recordRead)
	room := e.raw.AvailableBuffer()
	n, err := e.records.socket.Read(room[:cap(room)])
	_, _ = e.raw.Write(room[:n]) // the bytes are there already
	switch {
	case n >= largePiece:
		e.large = true
	case n < smallPiece:
		e.large = false
	}
	return err
}

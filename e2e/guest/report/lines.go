// SPDX-License-Identifier: Apache-2.0

// Package report defines what the test guest writes to its second serial port, and reads it on the host.
//
// The guest writes one JSON object a line; its "type" names one of the types below. Counters are cumulative from the
// boot of the guest. So a line that is lost with the source's serial port, or between two connections, loses no
// finding: the next line repeats it. All times are the guest's own CLOCK_MONOTONIC, which stands still while the VM
// does.
package report

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// Values of the "type" field.
const (
	TypeReady      = "ready"
	TypeWindow     = "window"
	TypeCorruption = "corruption"
	TypeVerified   = "verified"
	TypeState      = "state"
	TypeError      = "error"
)

// Ready is the first line: all memory is stamped and the load begins.
type Ready struct {
	Type     string `json:"type"`
	UptimeMS int64  `json:"uptime_ms"`
	Pages    uint32 `json:"pages"`    // stamped, of stamp.PageSize bytes
	Working  uint32 `json:"working"`  // of these, in the working set
	Workers  int    `json:"workers"`  // threads
	StampMS  int64  `json:"stamp_ms"` // how long stamping took
	Disks    int    `json:"disks,omitempty"`
	Cards    int    `json:"cards,omitempty"` // network cards, which are on already
}

// Counters are cumulative and in every later line.
type Counters struct {
	UptimeMS    int64  `json:"uptime_ms"`
	TotalOps    uint64 `json:"total_ops"`    // pages visited by the load
	TotalWrites uint64 `json:"total_writes"` // new generations written
	Corruptions uint64 `json:"corruptions"`  // damaged pages and table entries found
	// Churned is how often memory was taken, used, checked and given back.
	Churned uint64 `json:"churned,omitempty"`
}

// Window is one reporting period of the load.
type Window struct {
	Type string `json:"type"`
	Seq  uint64 `json:"seq"` // counts up from 1 without gaps
	Counters
	Ops uint64 `json:"ops"` // in this window
	// MaxUS is the guest's longest stall in microseconds: the slowest operation that ended in this window, or the age of
	// one that has not ended yet.
	MaxUS int64 `json:"max_us"`
	P50US int64 `json:"p50_us"`
	P99US int64 `json:"p99_us"`
	// Latencies are those of the operations that ended in this window.
	Latencies Histogram `json:"latencies"`
	Disks     []Disk    `json:"disks,omitempty"`
	Cards     []Card    `json:"cards,omitempty"`
}

// Corruption describes one damaged page, or block of a disk. Only the first ones are described, but all are counted.
type Corruption struct {
	Type string `json:"type"`
	Counters
	Disk     string     `json:"disk,omitempty"` // the disk with the block; empty: a page of memory
	Page     uint32     `json:"page"`
	Word     int        `json:"word"`     // first 8-byte word that differs
	Expected string     `json:"expected"` // hexadecimal
	Got      string     `json:"got"`      // hexadecimal
	Kind     stamp.Kind `json:"kind"`
}

// Verified answers the command "verify".
type Verified struct {
	Type string `json:"type"`
	Counters
	ID    string `json:"id,omitempty"` // as in the command
	Pages uint32 `json:"pages"`        // checked: all of them
	// Found is how many damaged pages and table entries this check met. Damage that the load met earlier is repaired by
	// then; it is in Corruptions.
	Found uint64 `json:"found"`
	// Blocks is how many blocks of disks were ever written; all are read now. BlocksFound of them are damaged or cannot be
	// read.
	Blocks      uint64 `json:"blocks,omitempty"`
	BlocksFound uint64 `json:"blocks_found,omitempty"`
	Disks       []Disk `json:"disks,omitempty"`
	Cards       []Card `json:"cards,omitempty"`
}

// Disk has the counters of one disk. All but MaxUS are cumulative.
type Disk struct {
	Name        string `json:"name"` // its serial number: disk0
	Reads       uint64 `json:"reads"`
	Writes      uint64 `json:"writes"`
	Flushes     uint64 `json:"flushes"`
	Errors      uint64 `json:"errors"`      // requests that failed
	Corruptions uint64 `json:"corruptions"` // blocks that do not hold what was written last
	// MaxUS is the slowest request, in microseconds, that ended since the line before.
	MaxUS int64 `json:"max_us"`
}

// Card has the counters of one network card, whose messages a client sends back. All but MaxUS are cumulative.
type Card struct {
	Name     string `json:"name"` // eth0
	Sent     uint64 `json:"sent"`
	Answered uint64 `json:"answered"`
	Lost     uint64 `json:"lost"`   // no answer within half a second
	Wrong    uint64 `json:"wrong"`  // the answer differed from the message
	Errors   uint64 `json:"errors"` // messages that could not be sent, or were refused
	// MaxUS is the slowest answer, in microseconds, since the line before.
	MaxUS int64 `json:"max_us"`
}

// State answers "load", "stop" and "idle": the load is on or off from here.
type State struct {
	Type string `json:"type"`
	Counters
	ID     string `json:"id,omitempty"`
	Loaded bool   `json:"loaded"`
}

// Error says that the guest cannot do what it was asked.
type Error struct {
	Type    string `json:"type"`
	Message string `json:"message"`
}

// Line is one parsed line; exactly one of its pointers is set.
type Line struct {
	At         time.Time // when it was read, by this machine's clock
	Ready      *Ready
	Window     *Window
	Corruption *Corruption
	Verified   *Verified
	State      *State
	Error      *Error
}

// Counters returns the cumulative counters of a line that carries them.
func (l Line) Counters() (Counters, bool) {
	switch {
	case l.Window != nil:
		return l.Window.Counters, true
	case l.Corruption != nil:
		return l.Corruption.Counters, true
	case l.Verified != nil:
		return l.Verified.Counters, true
	case l.State != nil:
		return l.State.Counters, true
	}
	return Counters{}, false
}

// An Encoder writes lines, each with a checksum after a tab. A serial port whose client comes or goes, or whose VM
// moves, may lose a byte or repeat one, and the rest may be a valid line that says something else.
type Encoder struct{ to io.Writer }

// NewEncoder returns an Encoder that writes each line at once.
func NewEncoder(to io.Writer) *Encoder { return &Encoder{to} }

// Encode writes one line.
func (e *Encoder) Encode(line any) error {
	b, err := json.Marshal(line)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.to, "%s\t%08x\n", b, crc32.ChecksumIEEE(b))
	return err
}

// Parse reads one line of the guest. It may have no checksum.
func Parse(b []byte) (Line, error) {
	var head struct {
		Type string `json:"type"`
	}
	b = bytes.TrimSpace(b)
	if i := bytes.LastIndexByte(b, '\t'); i >= 0 {
		if sum := fmt.Sprintf("%08x", crc32.ChecksumIEEE(b[:i])); sum != string(b[i+1:]) {
			return Line{}, fmt.Errorf("guest line %q: its checksum is %s", b, sum)
		}
		b = b[:i]
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return Line{}, fmt.Errorf("guest line %q: %w", b, err)
	}
	var l Line
	var into any
	switch head.Type {
	case TypeReady:
		l.Ready = new(Ready)
		into = l.Ready
	case TypeWindow:
		l.Window = new(Window)
		into = l.Window
	case TypeCorruption:
		l.Corruption = new(Corruption)
		into = l.Corruption
	case TypeVerified:
		l.Verified = new(Verified)
		into = l.Verified
	case TypeState:
		l.State = new(State)
		into = l.State
	case TypeError:
		l.Error = new(Error)
		into = l.Error
	default:
		return Line{}, fmt.Errorf("guest line %q: unknown type", b)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return Line{}, fmt.Errorf("guest line %q: %w", b, err)
	}
	return l, nil
}

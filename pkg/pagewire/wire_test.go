// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// generatedRequest and generatedReply are the same messages for the generated code.
func generatedRequest(r *Request) *migratedv1.FetchRequest {
	m := &migratedv1.FetchRequest{Holes: r.Holes, Piece: r.Piece}
	for _, g := range r.Ranges {
		m.Ranges = append(m.Ranges, &migratedv1.PageRange{Block: g.Block, Offset: g.Offset, Length: g.Length})
	}
	return m
}

func generatedReply(r *Reply) *migratedv1.FetchResponse {
	m := &migratedv1.FetchResponse{Data: bytes.Clone(r.Data)}
	for _, run := range r.Runs {
		m.Runs = append(m.Runs, &migratedv1.PageRun{
			Block: run.Block, Offset: run.Offset, Length: run.Length, Zero: run.Zero, Lost: run.Lost, Hole: run.Hole,
		})
	}
	return m
}

func encoded(t rapid.TB, message any) []byte {
	t.Helper()
	out, err := Codec{}.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Free()
	return bytes.Clone(out.Materialize())
}

func generated(t rapid.TB, m proto.Message) []byte {
	t.Helper()
	out, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// cut splits a message into pieces as HTTP/2 frames do, at the given places, empty pieces included.
func cut(message []byte, at ...int) mem.BufferSlice {
	var pieces mem.BufferSlice
	start := 0
	for _, end := range at {
		end = min(max(end, start), len(message))
		pieces = append(pieces, mem.SliceBuffer(message[start:end]))
		start = end
	}
	return append(pieces, mem.SliceBuffer(message[start:]))
}

func drawRun(t *rapid.T) Run {
	run := Run{
		Block:  rapid.OneOf(rapid.Uint32Max(3), rapid.Uint32()).Draw(t, "block"),
		Offset: rapid.OneOf(rapid.Uint64Max(1<<20), rapid.Uint64Max(math.MaxUint64-math.MaxUint32)).Draw(t, "offset"),
		Zero:   rapid.Bool().Draw(t, "zero"),
		Length: rapid.Uint32Range(1, 9000).Draw(t, "length"),
	}
	if !run.Zero {
		run.Lost = rapid.Bool().Draw(t, "lost")
		run.Hole = !run.Lost && rapid.Bool().Draw(t, "hole")
	}
	if !run.Carries() {
		run.Length = rapid.Uint32Min(1).Draw(t, "zero length")
	}
	return run
}

func TestRequestIsProtobuf(t *testing.T) {
	var got Request // reused over all checks, as a lane does
	rapid.Check(t, func(t *rapid.T) {
		sent := Request{Ranges: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Range {
			run := drawRun(t)
			return Range{run.Block, run.Offset, run.Length}
		}), 0, 20).Draw(t, "ranges"), Holes: rapid.Bool().Draw(t, "holes"), Piece: rapid.Uint32().Draw(t, "piece")}
		wire := encoded(t, &sent)
		if !bytes.Equal(wire, generated(t, generatedRequest(&sent))) {
			t.Fatalf("encoded %x", wire)
		}
		if err := (Codec{}).Unmarshal(cut(wire, drawCuts(t, len(wire))...), &got); err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(generatedRequest(&got), generatedRequest(&sent)) {
			t.Fatalf("decoded %+v", got)
		}
	})
}

func TestReplyIsProtobuf(t *testing.T) {
	var got, sent Reply
	rapid.Check(t, func(t *rapid.T) {
		sent.Runs = rapid.SliceOfN(rapid.Custom(drawRun), 0, 20).Draw(t, "runs")
		size := 0
		for _, run := range sent.Runs {
			if run.Carries() {
				size += int(run.Length)
			}
		}
		leased := rapid.Bool().Draw(t, "leased")
		if leased {
			sent.Lease(size + rapid.IntRange(0, 5000).Draw(t, "too much"))
			sent.Data = sent.Data[:size]
		} else {
			sent.Release()
			sent.Data = make([]byte, size)
		}
		for i := range sent.Data {
			sent.Data[i] = byte(i*7 + i>>8)
		}
		want := generatedReply(&sent)
		wire := encoded(t, &sent)
		if leased != (sent.Data == nil && sent.lease == nil) && size > 0 {
			t.Fatal("leased data stays, or data of the caller was taken")
		}
		if !bytes.Equal(wire, generated(t, want)) {
			t.Fatal("encoded differently from the generated code")
		}
		if err := (Codec{}).Unmarshal(cut(wire, drawCuts(t, len(wire))...), &got); err != nil {
			t.Fatal(err)
		}
		if decoded := generatedReply(&got); !proto.Equal(decoded, want) {
			t.Fatal("decoded differently from what was sent")
		}
	})
}

func drawCuts(t *rapid.T, size int) []int {
	cuts := rapid.SliceOfN(rapid.IntRange(0, size), 0, 6).Draw(t, "cuts")
	for i := 1; i < len(cuts); i++ {
		cuts[i] = max(cuts[i], cuts[i-1])
	}
	return cuts
}

// What a newer peer adds is skipped, at any place where a field may be.
func TestUnknownFieldsAreSkipped(t *testing.T) {
	unknown := []byte{
		0x48, 0xff, 0x01, // 9: number
		0x55, 1, 2, 3, 4, // 10: fixed32
		0x39, 1, 2, 3, 4, 5, 6, 7, 8, // 7: fixed64
		0x42, 3, 'n', 'e', 'w', // 8: bytes
	}
	run := append([]byte{0x08, 2, 0x10, 0x80, 0x20}, unknown...) // block 2, offset 4096
	run = append(run, 0x18, 2)                                   // length 2
	message := append(bytes.Clone(unknown), 0x0a, byte(len(run)))
	message = append(append(message, run...), unknown...)

	for at := range message {
		var request Request
		if err := (Codec{}).Unmarshal(cut(message, at), &request); err != nil {
			t.Fatal(err)
		}
		if len(request.Ranges) != 1 || request.Ranges[0] != (Range{2, 4096, 2}) {
			t.Fatalf("cut at %d: %+v", at, request)
		}
	}
	var reply Reply
	if err := (Codec{}).Unmarshal(cut(append(message, 0x12, 2, 'o', 'k')), &reply); err != nil {
		t.Fatal(err)
	}
	if len(reply.Runs) != 1 || reply.Runs[0] != (Run{Block: 2, Offset: 4096, Length: 2}) || string(reply.Data) != "ok" {
		t.Fatalf("%+v", reply)
	}
}

func TestMalformed(t *testing.T) {
	manyRuns := bytes.Repeat([]byte{0x0a, 4, 0x18, 1, 0x20, 1}, MaxRuns+1)
	for _, test := range []struct {
		name    string
		message any
		wire    []byte
	}{
		{"ranges as number", &Request{}, []byte{0x08, 1}},
		{"holes as bytes", &Request{}, []byte{0x12, 0}},
		{"block as bytes", &Request{}, []byte{0x0a, 2, 0x0a, 0}},
		{"ends within a tag", &Request{}, []byte{0x8a}},
		{"ends within a length", &Request{}, []byte{0x0a, 0x80}},
		{"range longer than message", &Request{}, []byte{0x0a, 5, 0x08, 1}},
		{"number crosses the end of its range", &Request{}, []byte{0x0a, 2, 0x08, 0x80, 0x01}},
		{"unknown bytes cross the end of their range", &Request{}, []byte{0x0a, 2, 0x42, 2, 1, 1}},
		{"unknown fixed64 crosses the end", &Request{}, []byte{0x39, 1, 2}},
		{"field number zero", &Request{}, []byte{0x00, 1}},
		{"field number too large", &Request{}, []byte{0x80, 0x80, 0x80, 0x80, 0x10, 1}},
		{"group", &Request{}, []byte{0x2b, 0x2c}},
		{"wire type 7", &Request{}, []byte{0x2f}},
		{"number of 11 bytes", &Request{}, append([]byte{0x28}, bytes.Repeat([]byte{0x80}, 11)...)},
		{"number beyond 64 bits", &Request{}, append([]byte{0x28},
			0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02)},
		{"block beyond 32 bits", &Request{}, []byte{0x0a, 6, 0x08, 0x80, 0x80, 0x80, 0x80, 0x10}},
		{"length of a field beyond 63 bits", &Request{}, append([]byte{0x0a},
			0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01)},
		{"range ends beyond 64 bits", &Request{}, []byte{
			0x0a, 13, 0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x18, 1,
		}},
		{"too many ranges", &Request{}, bytes.Repeat([]byte{0x0a, 0}, MaxRanges+1)},
		{"too many runs", &Reply{}, manyRuns},
		{"run without pages", &Reply{}, []byte{0x0a, 2, 0x20, 1}},
		{"zero and lost", &Reply{}, []byte{0x0a, 6, 0x18, 1, 0x20, 1, 0x28, 1}},
		{"zero and a hole", &Reply{}, []byte{0x0a, 6, 0x18, 1, 0x20, 1, 0x30, 1}},
		{"lost and a hole", &Reply{}, []byte{0x0a, 6, 0x18, 1, 0x28, 1, 0x30, 1}},
		{"data for a hole", &Reply{}, []byte{0x0a, 4, 0x18, 1, 0x30, 1, 0x12, 1, 0}},
		{"data missing", &Reply{}, []byte{0x0a, 2, 0x18, 1}},
		{"data without runs", &Reply{}, []byte{0x12, 1, 0}},
		{"data for a zero run", &Reply{}, []byte{0x0a, 4, 0x18, 1, 0x20, 1, 0x12, 1, 0}},
		{"data too short", &Reply{}, []byte{0x0a, 2, 0x18, 2, 0x12, 1, 0}},
		{"data as number", &Reply{}, []byte{0x10, 1}},
		{"data longer than message", &Reply{}, []byte{0x0a, 2, 0x18, 2, 0x12, 2, 0}},
		{"run after data", &Reply{}, []byte{0x12, 0, 0x0a, 4, 0x18, 1, 0x20, 1}},
		{"empty data not last", &Reply{}, []byte{0x12, 0, 0x12, 0}},
		{"reply too large", &Reply{}, make([]byte, MaxReplyBytes+1)},
	} {
		t.Run(test.name, func(t *testing.T) {
			for at := range min(len(test.wire), 20) {
				err := (Codec{}).Unmarshal(cut(test.wire, at), test.message)
				if !errors.Is(err, ErrMalformed) {
					t.Fatalf("cut at %d: %v", at, err)
				}
			}
		})
	}
}

func TestEncoderRefusesWhatNoDecoderTakes(t *testing.T) {
	for name, message := range map[string]any{
		"ranges":   &Request{Ranges: make([]Range, MaxRanges+1)},
		"runs":     &Reply{Runs: make([]Run, MaxRuns+1)},
		"data":     &Reply{Runs: []Run{{Length: MaxData + 1}}, Data: make([]byte, MaxData+1)},
		"mismatch": &Reply{Runs: []Run{{Length: 2}}, Data: make([]byte, 1)},
	} {
		if _, err := (Codec{}).Marshal(message); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// The largest of everything fits.
	full := &Reply{Runs: make([]Run, MaxRuns)}
	for i := range full.Runs {
		full.Runs[i] = Run{Block: math.MaxUint32, Offset: math.MaxUint64 - math.MaxUint32, Length: math.MaxUint32, Zero: true}
	}
	full.Runs[0].Zero, full.Runs[0].Length = false, MaxData
	full.Lease(MaxData)
	if err := (Codec{}).Unmarshal(cut(encoded(t, full), 100, 20000), &Reply{}); err != nil {
		t.Error(err)
	}
	ranges := &Request{Ranges: make([]Range, MaxRanges)}
	for i := range ranges.Ranges {
		ranges.Ranges[i] = Range{math.MaxUint32, math.MaxUint64 - math.MaxUint32, math.MaxUint32}
	}
	if err := (Codec{}).Unmarshal(cut(encoded(t, ranges), 100), &Request{}); err != nil {
		t.Error(err)
	}
}

// One server serves lanes and other services with the same codec.
func TestOtherMessagesAreProtobuf(t *testing.T) {
	sent := generatedRequest(&Request{Ranges: []Range{{1, 2, 3}}})
	wire := encoded(t, sent)
	if !bytes.Equal(wire, generated(t, sent)) {
		t.Errorf("encoded %x", wire)
	}
	got := &migratedv1.FetchRequest{}
	if err := (Codec{}).Unmarshal(cut(wire, 1), got); err != nil || !proto.Equal(got, sent) {
		t.Errorf("decoded %v: %v", got, err)
	}
	if _, err := (Codec{}).Marshal("no message"); err == nil {
		t.Error("a string was encoded")
	}
}

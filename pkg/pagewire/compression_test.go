// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

var both = []Compression{S2, Zstd}

func zstdEncoder(t rapid.TB) *zstd.Encoder {
	t.Helper()
	e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

var plainUnpacker, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))

// unpacked makes of a message of the generated code what it would be with raw data.
func unpacked(t rapid.TB, m *migratedv1.FetchResponse) *migratedv1.FetchResponse {
	t.Helper()
	var err error
	switch {
	case len(m.GetData()) == 0: // of zero runs, or of none
	case m.GetCompression() == migratedv1.Compression_COMPRESSION_S2:
		m.Data, err = s2.Decode(nil, m.GetData())
	case m.GetCompression() == migratedv1.Compression_COMPRESSION_ZSTD:
		m.Data, err = plainUnpacker.DecodeAll(m.GetData(), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.Compression = 0
	return m
}

// repetitive is content that packs well, no two pages of it alike.
func repetitive(size int) []byte {
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i%7*i%11 + i>>12*37)
	}
	return data
}

func noise(size int) []byte {
	data := make([]byte, size)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(data) // never fails
	return data
}

// A packed reply is what protobuf and the libraries make of it, however it was cut and whatever else the
// Reply was used for before.
func TestPackedReplyIsProtobuf(t *testing.T) {
	var sent, got Reply
	rapid.Check(t, func(t *rapid.T) {
		sent.Runs = rapid.SliceOfN(rapid.Custom(drawRun), 0, 20).Draw(t, "runs")
		size := 0
		for _, run := range sent.Runs {
			if run.Carries() {
				size += int(run.Length)
			}
		}
		sent.Lease(size)
		copy(sent.Data, repetitive(size))
		want := generatedReply(&sent)
		c := rapid.SampledFrom([]Compression{None, S2, Zstd}).Draw(t, "compression")
		carried := size
		if c != None && size > 0 {
			if packed := sent.Pack(c, size-1); packed < size {
				carried = packed
			} else {
				c = None
			}
		} else {
			c = None
		}
		if sent.Carried() != carried || sent.Compression() != c {
			t.Fatalf("%d bytes, %v, want %d, %v", sent.Carried(), sent.Compression(), carried, c)
		}
		wire := encoded(t, &sent)
		if sent.Data != nil || sent.lease != nil || sent.packed != nil {
			t.Fatal("SendMsg left something behind")
		}
		read := &migratedv1.FetchResponse{}
		if err := proto.Unmarshal(wire, read); err != nil {
			t.Fatal(err)
		}
		if len(read.GetData()) != carried || read.GetCompression() != migratedv1.Compression(c) {
			t.Fatalf("%d bytes, %v, want %d, %v", len(read.GetData()), read.GetCompression(), carried, c)
		}
		if !proto.Equal(unpacked(t, read), want) {
			t.Fatal("the generated code reads something else")
		}
		if err := (Codec{}).Unmarshal(cut(wire, drawCuts(t, len(wire))...), &got); err != nil {
			t.Fatal(err)
		}
		if got.Carried() != carried || got.Compression() != c {
			t.Fatalf("received %d bytes, %v, want %d, %v", got.Carried(), got.Compression(), carried, c)
		}
		if !proto.Equal(generatedReply(&got), want) {
			t.Fatal("decoded differently from what was sent")
		}
	})
}

// Bytes that do not shrink are sent as they are, also those that fill the largest frame.
func TestPackLeavesWhatDoesNotShrink(t *testing.T) {
	for _, c := range both {
		for _, size := range []int{1, 4096, 16 << 10, 128 << 10, 512 << 10, MaxData} {
			t.Run(fmt.Sprint(c, "/", size), func(t *testing.T) {
				reply := Reply{Runs: []Run{{Length: uint32(size)}}}
				reply.Lease(size)
				copy(reply.Data, noise(size))
				if packed := reply.Pack(c, size); packed <= size || packed > size+packSlack {
					t.Fatalf("%d bytes became %d: a frame may be too small", size, packed)
				}
				if reply.Carried() != size || reply.Compression() != None || reply.packed != nil {
					t.Fatalf("%d bytes, %v", reply.Carried(), reply.Compression())
				}
				var got Reply
				if err := (Codec{}).Unmarshal(cut(encoded(t, &reply), 100), &got); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got.Data, noise(size)) {
					t.Fatal("not what was sent")
				}
			})
		}
	}
}

// The content of a frame is its own: packing and reading may alternate in any order.
func TestPackedFramesAreApart(t *testing.T) {
	var sent, got Reply
	for i, c := range []Compression{S2, Zstd, Zstd, S2, S2} {
		size := 4096 << (2 * i)
		size = min(size, MaxData)
		sent.Runs = append(sent.Runs[:0], Run{Length: uint32(size)})
		sent.Lease(size)
		copy(sent.Data, repetitive(size))
		sent.Pack(both[1-i%2], size) // thrown away by what follows
		if sent.Pack(c, size) > size {
			t.Fatal("it does not shrink")
		}
		if err := (Codec{}).Unmarshal(cut(encoded(t, &sent), 10, 50), &got); err != nil {
			t.Fatal(err)
		}
		if got.Compression() != c || !bytes.Equal(got.Data, repetitive(size)) {
			t.Fatalf("%v: not what was sent", c)
		}
	}
}

func TestAnnounced(t *testing.T) {
	for _, test := range []struct {
		values   []string
		s2, zstd bool
	}{
		{nil, false, false},
		{[]string{""}, false, false},
		{[]string{Unpackable}, true, true},
		{[]string{"s2"}, true, false},
		{[]string{"lz9, zstd ,none,unknown compression"}, false, true},
		{[]string{"s2", "zstd"}, true, true},
		{[]string{"s2zstd", "S2"}, false, false},
	} {
		got := Announced(test.values)
		if got.Has(S2) != test.s2 || got.Has(Zstd) != test.zstd || !got.Has(None) {
			t.Errorf("%q: %b", test.values, got)
		}
	}
}

// packedWire makes a message of a data field that is packed somehow, for one run of that many bytes.
func packedWire(c Compression, raw uint32, data []byte) []byte {
	wire := appendRun(nil, Run{Length: raw})
	wire = appendNumber(wire, fieldCompression, uint64(c))
	wire = protowire.AppendTag(wire, fieldData, protowire.BytesType)
	return append(protowire.AppendVarint(wire, uint64(len(data))), data...)
}

// s2Claim is an S2 block that claims to be of a size, and is a page.
func s2Claim(size uint64) []byte {
	block := s2.Encode(nil, repetitive(4096))
	_, n := binary.Uvarint(block)
	return append(binary.AppendUvarint(nil, size), block[n:]...)
}

func TestHostilePackedData(t *testing.T) {
	page := repetitive(4096)
	z := zstdEncoder(t)
	bomb := z.EncodeAll(make([]byte, 16*MaxData), nil)
	var unsized bytes.Buffer // without the content's size in its header
	w, err := zstd.NewWriter(&unsized, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 16*MaxData)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		wire []byte
	}{
		{"s2: empty", packedWire(S2, 4096, nil)},
		{"s2: no length", packedWire(S2, 4096, []byte{0x80})},
		{"s2: length only", packedWire(S2, 4096, binary.AppendUvarint(nil, 4096))},
		{"s2: claims 4 GiB", packedWire(S2, 4096, s2Claim(1<<32-1))},
		{"s2: claims more than 32 bits", packedWire(S2, 4096, s2Claim(1<<40))},
		{"s2: claims a byte more", packedWire(S2, 4096, s2Claim(4097))},
		{"s2: claims a byte less", packedWire(S2, 4096, s2Claim(4095))},
		{"s2: claims what the runs say, has more", packedWire(S2, 2048, s2Claim(2048))},
		{"s2: claims what the runs say, has less", packedWire(S2, 8192, s2Claim(8192))},
		{"s2: cut", packedWire(S2, 4096, s2.Encode(nil, noise(4096))[:2000])},
		{"s2: copies from before the beginning", packedWire(S2, 64, []byte{64, 0xfe, 0xff, 0xff})},
		{"s2: zstd instead", packedWire(S2, 4096, z.EncodeAll(page, nil))},
		{"s2: runs beyond a reply", packedWire(S2, MaxData+1, s2.Encode(nil, make([]byte, MaxData+1)))},
		{"s2: runs of 4 GiB", packedWire(S2, 1<<32-1, s2Claim(1<<32-1))},
		{"zstd: empty", packedWire(Zstd, 4096, nil)},
		{"zstd: bomb", packedWire(Zstd, 4096, bomb)},
		{"zstd: bomb for the largest reply", packedWire(Zstd, MaxData, bomb)},
		{"zstd: bomb without a size", packedWire(Zstd, 4096, unsized.Bytes())},
		{"zstd: bomb of many frames", packedWire(Zstd, 4096, bytes.Repeat(z.EncodeAll(page, nil), 1000))},
		{"zstd: a byte more", packedWire(Zstd, 4095, z.EncodeAll(page, nil))},
		{"zstd: a byte less", packedWire(Zstd, 4097, z.EncodeAll(page, nil))},
		{"zstd: cut", packedWire(Zstd, 4096, z.EncodeAll(noise(4096), nil)[:2000])},
		{"zstd: only a frame to be skipped", packedWire(Zstd, 4096, []byte{0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0})},
		{"zstd: garbage behind", packedWire(Zstd, 4096, append(z.EncodeAll(page, nil), 1, 2, 3))},
		{"zstd: s2 instead", packedWire(Zstd, 4096, s2.Encode(nil, page))},
		{"zstd: runs beyond a reply", packedWire(Zstd, MaxData+1, z.EncodeAll(make([]byte, MaxData+1), nil))},
		{"unknown compression", packedWire(compressions, 4096, page)},
		{"compression as bytes", []byte{0x1a, 1, 1}},
		{"compression after the data", append(packedWire(None, 4096, page), 0x18, 1)},
		{"raw data said to be packed", packedWire(S2, 4096, page)},
		{"packed data said to be raw", packedWire(None, 4096, s2.Encode(nil, page))},
		{"packed data for no run", []byte{0x18, 1, 0x12, 1, 0}},
		{"packed nothing for no run", []byte{0x18, 1, 0x12, 0}},
		{"packed data for a zero run", []byte{0x0a, 4, 0x18, 1, 0x20, 1, 0x18, 1, 0x12, 1, 0}},
		{"packed data missing", []byte{0x0a, 2, 0x18, 1, 0x18, 1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var reply Reply
			for at := range min(len(test.wire), 20) {
				err := (Codec{}).Unmarshal(cut(test.wire, at, len(test.wire)-at), &reply)
				if !errors.Is(err, ErrMalformed) {
					t.Fatalf("cut at %d: %v", at, err)
				}
				if reply.Data != nil || cap(reply.own) > MaxData {
					t.Fatalf("%d bytes of data in a buffer of %d", len(reply.Data), cap(reply.own))
				}
			}
			// Now that it has its buffers, not even what is refused makes it take more memory.
			message := cut(test.wire, 1)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_ = (Codec{}).Unmarshal(message, &reply)
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 64<<10 {
				t.Errorf("%d bytes of memory taken", n)
			}
			// The same Reply reads the next message.
			for _, c := range both {
				good := z.EncodeAll(page, nil)
				if c == S2 {
					good = s2.Encode(nil, page)
				}
				if err := (Codec{}).Unmarshal(cut(packedWire(c, 4096, good), 5), &reply); err != nil ||
					!bytes.Equal(reply.Data, page) {
					t.Fatalf("%v afterwards: %v", c, err)
				}
			}
		})
	}
}

// What says twice how it is packed means the last, as everywhere in protobuf, and a reply without data may
// say it too.
func TestOddButValidCompression(t *testing.T) {
	page := repetitive(4096)
	twice := append([]byte{0x18, 2}, packedWire(S2, 4096, s2.Encode(nil, page))...)
	var reply Reply
	if err := (Codec{}).Unmarshal(cut(twice), &reply); err != nil || !bytes.Equal(reply.Data, page) {
		t.Error(err)
	}
	if err := (Codec{}).Unmarshal(cut([]byte{0x0a, 4, 0x18, 1, 0x20, 1, 0x18, 1}), &reply); err != nil ||
		len(reply.Runs) != 1 {
		t.Error(err)
	}
}

// SPDX-License-Identifier: Apache-2.0

// The race detector makes sync.Pool forget at random.
//go:build !race

package pagewire

import (
	"bytes"
	"fmt"
	"testing"

	"google.golang.org/grpc/mem"
)

// http2Frame is the payload of the HTTP/2 frames that gRPC sends.
const http2Frame = 16 << 10

// received makes of a message what gRPC delivers: pooled buffers, one for each frame.
func received(message []byte) mem.BufferSlice {
	var pieces mem.BufferSlice
	for len(message) > 0 {
		n := min(len(message), http2Frame)
		pieces = append(pieces, mem.Copy(message[:n], mem.DefaultBufferPool()))
		message = message[n:]
	}
	return pieces
}

// eachSize runs a benchmark or test for a page of a fault and a run of the sweep.
func eachSize(run func(name string, bytes int)) {
	for _, size := range []int{4 << 10, 512 << 10} {
		run(fmt.Sprintf("%dKiB", size>>10), size)
	}
}

func send(t testing.TB, r *Reply, size int, c Compression) {
	r.Lease(size)
	if c != None {
		copy(r.Data, packable[:size])
		for range 2 { // the second one replaces the first
			if r.Pack(c, size) > size/2 {
				t.Fatal("it is not packed")
			}
		}
	}
	r.Runs = append(r.Runs[:0], Run{Block: 1, Offset: 1 << 30, Length: uint32(size)})
	message, err := Codec{}.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	message.Free() // gRPC has written it
}

// packable packs to a quarter, so that a run of the sweep comes in several pieces when it is packed.
var packable = func() []byte {
	data, random := repetitive(512<<10), noise(512<<10)
	for at := 0; at < len(data); at += 2048 {
		copy(data[at:at+512], random[at:])
	}
	return data
}()

// ways are how the data of a reply may come.
var ways = []Compression{None, S2, Zstd}

// message is a reply as it comes.
func message(t testing.TB, size int, c Compression) mem.BufferSlice {
	reply := &Reply{Runs: []Run{{Length: uint32(size)}}, Data: packable[:size]}
	if c != None {
		reply.Pack(c, size)
	}
	return received(encoded(t, reply))
}

func receive(t testing.TB, r *Reply, message mem.BufferSlice, size int) {
	if err := (Codec{}).Unmarshal(message, r); err != nil {
		t.Fatal(err)
	}
	if len(r.Data) != size {
		t.Fatalf("%d bytes", len(r.Data))
	}
}

// The average of AllocsPerRun is rounded down, so that a pool that the garbage collector empties during
// the measurement does not count.
func TestNoAllocations(t *testing.T) {
	wantNone := func(t *testing.T, f func()) {
		t.Helper()
		if n := testing.AllocsPerRun(1000, f); n != 0 {
			t.Errorf("%v allocations", n)
		}
	}
	eachSize(func(name string, size int) {
		for _, c := range ways {
			t.Run(fmt.Sprint("send/", name, "/", c), func(t *testing.T) {
				var reply Reply
				wantNone(t, func() { send(t, &reply, size, c) })
			})
			t.Run(fmt.Sprint("receive/", name, "/", c), func(t *testing.T) {
				var reply Reply
				defer reply.Release()
				message := message(t, size, c)
				wantNone(t, func() { receive(t, &reply, message, size) })
			})
		}
	})
	t.Run("request", func(t *testing.T) {
		request := Request{Ranges: []Range{{1, 1 << 30, 4096}, {1, 1 << 31, 4096}}}
		var got Request
		wantNone(t, func() {
			message, err := Codec{}.Marshal(&request)
			if err != nil {
				t.Fatal(err)
			}
			if err := (Codec{}).Unmarshal(message, &got); err != nil {
				t.Fatal(err)
			}
			message.Free()
		})
	})
}

// A page that came in one piece is not copied, and stays valid after gRPC let go of it.
func TestReceivedPageIsNotCopied(t *testing.T) {
	content := make([]byte, 4096)
	for i := range content {
		content[i] = byte(i)
	}
	message := received(encoded(t, &Reply{Runs: []Run{{Length: 4096}}, Data: content}))
	var reply Reply
	if err := (Codec{}).Unmarshal(message, &reply); err != nil {
		t.Fatal(err)
	}
	whole := message[0].ReadOnlyData()
	if &reply.Data[4095] != &whole[len(whole)-1] {
		t.Error("the page was copied")
	}
	message.Free()
	if !bytes.Equal(reply.Data, content) {
		t.Error("the page changed when gRPC freed its buffer")
	}
	held := reply.held
	reply.Release()
	defer func() {
		if recover() == nil {
			t.Error("Release did not drop the last reference")
		}
	}()
	held.ReadOnlyData() // panics when the buffer is free
}

func BenchmarkReply(b *testing.B) {
	eachSize(func(name string, size int) {
		for _, c := range ways {
			b.Run(fmt.Sprint("send/", name, "/", c), func(b *testing.B) {
				var reply Reply
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					send(b, &reply, size, c)
				}
			})
			b.Run(fmt.Sprint("receive/", name, "/", c), func(b *testing.B) {
				var reply Reply
				defer reply.Release()
				message := message(b, size, c)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					receive(b, &reply, message, size)
				}
			})
		}
	})
}

// SPDX-License-Identifier: Apache-2.0

package pagewire

import (
	"sync"

	"google.golang.org/grpc/mem"
)

// headroom is the space in a frame before the page bytes: enough for the header of MaxRuns runs, and
// whole pages, so that page bytes stay aligned.
const headroom = 8 << 10

// A frame is the memory of one outgoing message. gRPC holds it until the message is written to the
// socket, then it returns to its pool.
//
//	memory: │ unused │ header │ page bytes │ unused │
//	                 └──────── view ───────┘
//
// The frame carries all that gRPC wants for a message, so that sending one allocates nothing here: the
// slice header that mem.NewBuffer points at (view), the backing array of the mem.BufferSlice (message),
// and it is itself the mem.BufferPool that its only buffer returns to.
type frame struct {
	memory  []byte
	view    []byte
	message [1]mem.Buffer
	home    *sync.Pool
}

// frameSizes are the kinds of frames: a request or the pages of a few faults, a run of a fault with its
// surroundings, a run of the sweep, a huge page.
var frameSizes = [...]int{
	headroom + 16<<10 + packSlack, headroom + 128<<10 + packSlack, headroom + 512<<10 + packSlack,
	headroom + MaxData + packSlack,
}

var framePools [len(frameSizes)]sync.Pool

// leaseFrame returns a frame with at least size bytes of memory; size is at most MaxReplyBytes and
// packSlack.
func leaseFrame(size int) *frame {
	class := 0
	for frameSizes[class] < size {
		class++
	}
	home := &framePools[class]
	if f, ok := home.Get().(*frame); ok {
		return f
	}
	return &frame{memory: make([]byte, frameSizes[class]), home: home}
}

func (f *frame) recycle() { f.home.Put(f) }

// pass hands view, a part of memory, over to gRPC.
//
// gRPC walks through the returned slice while it writes, which may be after SendMsg has returned. It
// frees the only buffer last, so the backing array is not read any more when Put recycles it. (With two
// buffers it would be: the first is freed while the second is still to be read.)
func (f *frame) pass(view []byte) mem.BufferSlice {
	f.view = view
	f.message[0] = mem.NewBuffer(&f.view, f)
	return f.message[:]
}

// Get implements mem.BufferPool; buffers only ever return to a frame.
func (f *frame) Get(int) *[]byte { panic("pagewire: a frame is no source of buffers") }

// Put implements mem.BufferPool: gRPC has freed its last reference.
func (f *frame) Put(*[]byte) { f.recycle() }

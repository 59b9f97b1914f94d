// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// thread is an OS thread of ours that is a tracer. Linux binds a tracee to the thread that attached, not
// to that thread's process: a ptrace request of any other thread fails with ESRCH.
type thread struct {
	jobs  chan func()
	tid   int
	ended chan struct{}

	abandon bool // owned by the goroutine in serve; see endByExit
}

func startThread() *thread {
	t := &thread{jobs: make(chan func()), ended: make(chan struct{})}
	ready := make(chan struct{})
	go t.serve(ready)
	<-ready
	return t
}

func (t *thread) serve(ready chan struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// endByExit needs a thread that ends, but the Go runtime never ends the process' first thread. While we
		// occupy it, the next goroutine gets another one.
		go t.serve(ready)
		<-ready
		runtime.UnlockOSThread()
		return
	}
	t.tid = unix.Gettid()
	close(ready)
	for job := range t.jobs {
		job()
	}
	if !t.abandon {
		runtime.UnlockOSThread()
	}
	close(t.ended)
}

// do runs f on the thread and returns its result.
func (t *thread) do(f func() error) error {
	result := make(chan error, 1)
	t.jobs <- func() { result <- f() }
	return <-result
}

// end gives the thread back to the Go runtime. No tracee may be attached to it any more.
func (t *thread) end() {
	close(t.jobs)
	<-t.ended
}

// endByExit ends the OS thread itself. The kernel detaches the tracees of a tracer that exits. That is the
// only way to detach a tracee that does not stop: PTRACE_DETACH needs a stopped one.
func (t *thread) endByExit() {
	t.jobs <- func() { t.abandon = true }
	t.end()
	// A locked goroutine's thread exits some time after the goroutine. Wait for it, so that the tracee is free when
	// endByExit returns.
	for range 1000 {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", t.tid)); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// thread is an OS thread of ours that serves as a tracer. Linux binds a tracee to the thread that attached, not
// to its process: any other thread's ptrace request fails with ESRCH.
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
		// The Go runtime never ends the process' first thread, which endByExit relies on. While we sit on it,
		// the next goroutine necessarily gets another one.
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

// end gives the thread back to the Go runtime. Nothing may be attached to it any more.
func (t *thread) end() {
	close(t.jobs)
	<-t.ended
}

// endByExit ends the OS thread itself. The kernel detaches what is attached to an exiting tracer, which is the
// only way to let go of a tracee that does not stop: PTRACE_DETACH wants a stopped one.
func (t *thread) endByExit() {
	t.jobs <- func() { t.abandon = true }
	t.end()
	// A locked goroutine's thread exits some time after the goroutine. Wait so that the caller finds the tracee
	// free.
	for range 1000 {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", t.tid)); err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

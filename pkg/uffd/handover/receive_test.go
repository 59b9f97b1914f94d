// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
)

// pair makes two connected stream sockets of this process.
func pair(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// listen returns the path of a socket and a function that accepts one connection there.
func listen(t *testing.T) (path string, accept func() *net.UnixConn) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "uffd.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return path, func() *net.UnixConn {
		c, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
}

func me() PeerPolicy { return PeerPolicy{UIDs: []uint32{uint32(os.Geteuid())}} }

// TestMonitor has another process hand its memory over as Firecracker does. The process then faults and continues.
func TestMonitor(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	monitor := c.Supervise(0) // makes the monitor's handshake on our copy of its descriptor
	r := c.Map(uffdtest.Anon, 2)
	if _, err := monitor.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	if err := monitor.Close(); err != nil {
		t.Fatal(err)
	}

	path, accept := listen(t)
	c.Send(path, fmt.Sprintf(
		`[{"base_host_virt_addr":%d,"size":%d,"offset":0,"page_size":4096,"page_size_kib":4096}]`, r.Start, r.Len,
	))
	policy := me()
	policy.PIDs = []int32{int32(c.Pid)}
	h, err := Receive(t.Context(), accept(), policy)
	if err != nil {
		t.Fatal(err)
	}
	defer h.UFFD.Close()
	if int(h.Peer.Pid) != c.Pid || len(h.Mappings) != 1 || h.Mappings[0].Range() != r {
		t.Errorf("received %+v, want %v of process %d", h, r, c.Pid)
	}

	reader := c.Go(uffdtest.Read(r.Start + 4096))
	uffdtest.NextFault(t, h.UFFD, r.Start+4096)
	page := uffdtest.Page(uffdtest.Anon, 1)
	if _, err := h.UFFD.Copy(r.Start+4096, page, 0); err != nil {
		t.Fatal(err)
	}
	if v := reader.JoinOK(); byte(v) != page[0] {
		t.Errorf("the thread read %#x", v)
	}
}

func TestSend(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	c := uffdtest.Start(t)
	u := c.Supervise(0)
	r := c.Map(uffdtest.Shmem, 4)
	if _, err := u.Register(r, uffd.ModeMissing); err != nil {
		t.Fatal(err)
	}
	want := []Mapping{
		{BaseHostVirtAddr: r.Start + 8192, Size: 8192, PageSize: 4096},
		{BaseHostVirtAddr: r.Start, Size: 8192, Offset: 8192, PageSize: 4096},
	}
	ours, theirs := pair(t)
	if err := Send(t.Context(), theirs, want, u); err != nil {
		t.Fatal(err)
	}
	h, err := Receive(t.Context(), ours, me())
	if err != nil {
		t.Fatal(err)
	}
	defer h.UFFD.Close()
	if fmt.Sprint(h.Mappings) != fmt.Sprint(want) {
		t.Errorf("received %v, want %v", h.Mappings, want)
	}
	if n, err := h.UFFD.Zeropage(r, 0); uint64(n) != r.Len || err != nil {
		t.Errorf("the received descriptor: %d, %v", n, err)
	}
	if err := Send(t.Context(), theirs, nil, u); !errors.Is(err, ErrInvalid) {
		t.Errorf("no mappings: %v", err)
	}
}

const good = `[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096}]`

// TestHostile sends messages that are no hand-over. After each, no descriptor is left.
func TestHostile(t *testing.T) {
	newUFFD := func(t *testing.T) int {
		u, err := uffd.Open(uffd.OpenOptions{UserModeOnly: true})
		if err != nil {
			testenv.CannotRun(t, "%v", err)
		}
		t.Cleanup(func() { u.Close() })
		return u.FD()
	}
	type piece struct {
		text string
		fds  []int
	}
	for _, tt := range []struct {
		name   string
		pieces func(t *testing.T) []piece
		is     error
		says   string
	}{
		{"nothing", func(*testing.T) []piece { return nil }, io.ErrUnexpectedEOF, "ends after 0 bytes"},
		{"cut off", func(t *testing.T) []piece {
			return []piece{{good[:20], []int{newUFFD(t)}}}
		}, io.ErrUnexpectedEOF, "ends after 20 bytes"},
		{"no descriptor", func(*testing.T) []piece { return []piece{{good, nil}} }, ErrInvalid, "no descriptor"},
		{"two descriptors", func(t *testing.T) []piece {
			return []piece{{good, []int{newUFFD(t), newUFFD(t)}}}
		}, ErrInvalid, "2 descriptors"},
		{"two, one by one", func(t *testing.T) []piece {
			return []piece{{good[:5], []int{newUFFD(t)}}, {good[5:], []int{newUFFD(t)}}}
		}, ErrInvalid, "2 descriptors"},
		{"as many as fit", func(t *testing.T) []piece {
			fds := make([]int, scmMaxFD)
			for i := range fds {
				fds[i] = 0
			}
			return []piece{{good, fds}}
		}, ErrInvalid, "253 descriptors"},
		{"another file", func(*testing.T) []piece { return []piece{{good, []int{0}}} }, ErrInvalid, "not a userfaultfd"},
		{"not an array", func(t *testing.T) []piece {
			return []piece{{"{}", []int{newUFFD(t)}}}
		}, ErrInvalid, "begin with an array"},
		{"two messages", func(t *testing.T) []piece {
			return []piece{{good + good, []int{newUFFD(t)}}}
		}, ErrInvalid, "follows"},
		{"bad mapping", func(t *testing.T) []piece {
			return []piece{{`[{"size":-1}]`, []int{newUFFD(t)}}}
		}, ErrInvalid, "size"},
		{"without end", func(t *testing.T) []piece {
			return []piece{{"[" + strings.Repeat(" ", maxMessage), []int{newUFFD(t)}}}
		}, ErrInvalid, "longer than 65536"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			ours, theirs := pair(t)
			pieces := tt.pieces(t)
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				defer theirs.Close()
				for _, p := range pieces {
					var rights []byte
					if p.fds != nil {
						rights = unix.UnixRights(p.fds...)
					}
					n, _, err := theirs.WriteMsgUnix([]byte(p.text), rights, nil)
					if err == nil && n < len(p.text) {
						_, err = theirs.Write([]byte(p.text[n:]))
					}
					if err != nil && !errors.Is(err, unix.EPIPE) {
						t.Errorf("send: %v", err)
					}
				}
			}()
			h, err := Receive(t.Context(), ours, me())
			ours.Close() // ends a sender that is still sending
			<-sent
			if err == nil {
				h.UFFD.Close()
				t.Fatal("accepted")
			}
			if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want %v with %q", err, tt.is, tt.says)
			}
		})
	}
}

// TestPieces sends the message byte by byte, with white space around it and the descriptor in the middle.
func TestPieces(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	u, err := uffd.Open(uffd.OpenOptions{UserModeOnly: true})
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	defer u.Close()
	ours, theirs := pair(t)
	sent := make(chan error, 1)
	go func() {
		var err error
		for i, c := range []byte("\n " + good) {
			var rights []byte
			if i == 30 {
				rights = unix.UnixRights(u.FD())
			}
			if _, _, e := theirs.WriteMsgUnix([]byte{c}, rights, nil); e != nil {
				err = e
			}
		}
		sent <- err
	}()
	h, err := Receive(t.Context(), ours, me())
	if err != nil {
		t.Fatal(err)
	}
	defer h.UFFD.Close()
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	flags, err := unix.FcntlInt(uintptr(h.UFFD.FD()), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("the descriptor is blocking (%v)", err)
	}
	flags, err = unix.FcntlInt(uintptr(h.UFFD.FD()), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("the descriptor is not close-on-exec (%v)", err)
	}
}

// TestTruncated checks the error when the kernel cannot give us the descriptor, because we may have no more.
func TestTruncated(t *testing.T) {
	ours, theirs := pair(t)
	if _, _, err := theirs.WriteMsgUnix([]byte(good), unix.UnixRights(0), nil); err != nil {
		t.Fatal(err)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	_, err := Receive(t.Context(), ours, me())
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err == nil || !strings.Contains(err.Error(), "MSG_CTRUNC") {
		t.Errorf("error %v", err)
	}
}

func TestPeerPolicy(t *testing.T) {
	uid, pid := uint32(os.Geteuid()), int32(os.Getpid())
	for _, tt := range []struct {
		name    string
		policy  PeerPolicy
		allowed bool
	}{
		{"nobody", PeerPolicy{}, false},
		{"the user", PeerPolicy{UIDs: []uint32{uid + 1, uid}}, true},
		{"another user", PeerPolicy{UIDs: []uint32{uid + 1}}, false},
		{"the process", PeerPolicy{UIDs: []uint32{uid}, PIDs: []int32{pid}}, true},
		{"another process", PeerPolicy{UIDs: []uint32{uid}, PIDs: []int32{pid + 1}}, false},
		{"the process without its user", PeerPolicy{PIDs: []int32{pid}}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uffdtest.CheckDescriptors(t)
			ours, theirs := pair(t)
			theirs.Close() // an allowed peer gets the error of a message that ends early
			_, err := Receive(t.Context(), ours, tt.policy)
			if refused := errors.Is(err, ErrPeerRefused); refused == tt.allowed {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestCancel checks that Receive returns at the end of the context if the peer sends nothing, and that the
// connection can be used again.
func TestCancel(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	ours, theirs := pair(t)
	if _, err := theirs.Write([]byte("[{")); err != nil {
		t.Fatal(err)
	}
	because := errors.New("the operator lost patience")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error)
	go func() {
		_, err := Receive(ctx, ours, me())
		result <- err
	}()
	cancel(because)
	if err := <-result; !errors.Is(err, because) {
		t.Errorf("error %v", err)
	}
	theirs.Close()
	if _, err := Receive(t.Context(), ours, me()); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestSupervisionOfReceived checks that a received descriptor shows its label, but not whether it was made with
// UFFD_SECURE.
func TestSupervisionOfReceived(t *testing.T) {
	uffdtest.CheckDescriptors(t)
	made, err := uffd.Open(uffd.OpenOptions{})
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	defer made.Close()
	if _, _, err := made.API(0); err != nil {
		t.Fatal(err)
	}
	_, label, err := made.Supervision()
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := pair(t)
	if err := Send(t.Context(), theirs, []Mapping{
		{BaseHostVirtAddr: 4096, Size: 4096, PageSize: 4096},
	}, made); err != nil {
		t.Fatal(err)
	}
	h, err := Receive(t.Context(), ours, me())
	if err != nil {
		t.Fatal(err)
	}
	defer h.UFFD.Close()
	want := uffd.Unsupervised
	if label != "" {
		want = uffd.Labelled
	}
	if got, l, err := h.UFFD.Supervision(); got != want || l != label || err != nil {
		t.Errorf("received one is %v, labelled %q (%v); want %v, labelled %q", got, l, err, want, label)
	}
}

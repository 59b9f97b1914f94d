// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/pprof"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/gomaxprocs"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// engine runs the role of the destination host's process. The VM is a child of it, which faults.
func engine(ctx context.Context, j job) error {
	vm, err := startVM(ctx, j)
	if err != nil {
		return err
	}
	defer vm.end()
	answer := withEngine
	if j.Lane == "bare" {
		answer = bare
	}
	s, err := answer(ctx, j, vm)
	if err != nil {
		return err
	}
	if s.RSS, err = peakRSS(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(s)
}

// vm is the process whose memory is filled. It waits for an order to begin.
type vm struct {
	addr, size uint64 // of its RAM, in bytes
	uffds      []*uffd.UFFD

	cmd    *exec.Cmd
	socket *os.File
	lines  *bufio.Reader
}

func startVM(ctx context.Context, j job) (*vm, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	v := &vm{socket: os.NewFile(uintptr(pair[0]), "vm")}
	theirs := os.NewFile(uintptr(pair[1]), "vm")
	defer theirs.Close()
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	order := "shuffled"
	if j.Rising {
		order = "rising"
	}
	v.cmd = exec.CommandContext(ctx, j.Fault, "away", order, number(j.Size), number(j.Pages), strconv.Itoa(j.Threads),
		strconv.Itoa(j.UFFDs), strconv.Itoa(toucherCPU), "-1")
	v.cmd.ExtraFiles, v.cmd.Stderr = []*os.File{theirs}, os.Stderr
	stdout, err := v.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	v.lines = bufio.NewReader(stdout)
	if err := v.cmd.Start(); err != nil {
		return nil, err
	}
	_ = theirs.Close() // closed now, so that the end of the program is noticed
	return v, v.receive(pair[0], j.UFFDs)
}

// receive takes the addresses and descriptors that testdata/fault.c hands over.
func (v *vm) receive(socket, uffds int) error {
	where, control := make([]byte, 16), make([]byte, unix.CmsgSpace(uffds*4))
	n, controlLen, _, _, err := unix.Recvmsg(socket, where, control, unix.MSG_CMSG_CLOEXEC)
	if err != nil || n != len(where) {
		return fmt.Errorf("%d bytes from the program that faults: %w", n, errors.Join(err, io.ErrUnexpectedEOF))
	}
	v.addr, v.size = binary.NativeEndian.Uint64(where), binary.NativeEndian.Uint64(where[8:])
	messages, err := unix.ParseSocketControlMessage(control[:controlLen])
	if err != nil {
		return err
	}
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return err
		}
		for _, fd := range fds {
			v.uffds = append(v.uffds, uffd.FromFD(fd))
		}
	}
	if len(v.uffds) != uffds {
		return fmt.Errorf("%d userfaultfds instead of %d", len(v.uffds), uffds)
	}
	return nil
}

// touch lets the threads touch their pages and returns their times.
func (v *vm) touch() (s sample, err error) {
	if _, err := v.socket.Write([]byte{1}); err != nil {
		return s, err
	}
	line, err := v.lines.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s)
	}
	if err != nil {
		return s, fmt.Errorf("the program that faults: %w", err)
	}
	return s, nil
}

func (v *vm) end() {
	for _, u := range v.uffds {
		_ = u.Close() // threads that still wait go on
	}
	_ = v.socket.Close()
	_ = v.cmd.Wait()
}

// blocks splits the RAM evenly over the userfaultfds.
func (v *vm) blocks() (all []postcopy.Block) {
	part := v.size / uint64(len(v.uffds))
	for i, u := range v.uffds {
		all = append(all, postcopy.Block{
			ID: fmt.Sprint("ram", i), Addr: v.addr + uint64(i)*part, Size: part, PageSize: pageSize, UFFD: u,
		})
	}
	return all
}

// withEngine answers the faults with the engine.
func withEngine(ctx context.Context, j job, v *vm) (s sample, err error) {
	e, err := postcopy.New(postcopy.Options{Blocks: v.blocks(), Workers: workers, Sleeps: gomaxprocs.Add})
	if err != nil {
		return s, err
	}
	l, err := openLanes(ctx, j)
	if err != nil {
		return s, err
	}
	defer l.close()
	ctx, cancel := context.WithCancel(ctx)
	gate := &gated{Lane: l.bulk, open: make(chan struct{}), ctx: ctx}
	result := make(chan error, 1)
	go func() { result <- e.Run(ctx, l.demand, gate, nil) }()
	defer func() {
		cancel()
		if runErr := <-result; err == nil && !errors.Is(runErr, context.Canceled) {
			err = runErr
		}
	}()
	e.StartSweep()
	stop, err := profile(j)
	if err != nil {
		return s, err
	}
	if s, err = v.touch(); err != nil {
		return s, err
	}
	s.Inside = int64(e.Stats().FaultP50)
	if j.Sweep {
		began := time.Now()
		close(gate.open)
		select {
		case <-e.Done():
		case err := <-result:
			result <- err
			return s, fmt.Errorf("the sweep ended early: %w", err)
		}
		s.Sweep = int64(time.Since(began))
	}
	return s, stop()
}

func profile(j job) (stop func() error, err error) {
	if j.Profile == "" {
		return func() error { return nil }, nil
	}
	f, err := os.Create(j.Profile)
	if err != nil {
		return nil, err
	}
	return func() error { pprof.StopCPUProfile(); return f.Close() }, pprof.StartCPUProfile(f)
}

// bare answers the faults with pkg/uffd alone: the loop of testdata/fault.c, in Go.
func bare(_ context.Context, j job, v *vm) (s sample, err error) {
	u := v.uffds[0]
	if _, _, err := u.API(0); err != nil {
		return s, err
	}
	if _, err := u.Register(uffd.Range{Start: v.addr, Len: v.size}, uffd.ModeMissing); err != nil {
		return s, err
	}
	done := make(chan error, 1)
	go func() { done <- answerAll(u, j.Pages) }()
	if s, err = v.touch(); err != nil {
		return s, err
	}
	return s, <-done
}

func answerAll(u *uffd.UFFD, pages uint64) error {
	page := make([]byte, pageSize)
	page[0] = 1
	buf := uffd.NewEventBuffer(1)
	fds := []unix.PollFd{{Fd: int32(u.FD()), Events: unix.POLLIN}}
	for pages > 0 {
		_, err := u.Read(buf)
		if errors.Is(err, uffd.ErrWouldBlock) {
			if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		if _, err := u.Copy(buf.At(0).Pagefault.Addr, page, 0); err != nil {
			return err
		}
		pages--
	}
	return nil
}

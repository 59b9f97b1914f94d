// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// mapRAM maps the VM's RAM file on h into the test's process, which is not QEMU. The caller unmaps it.
func mapRAM(t *testing.T, vm lab.VMConfig, h *lab.Host) []byte {
	t.Helper()
	mapped, err := lab.MapFile(h.Path(vm.RAMFiles()[0]))
	if err != nil {
		t.Fatal(err)
	}
	return mapped
}

func unmap(t *testing.T, mapped []byte) {
	t.Helper()
	if err := unix.Munmap(mapped); err != nil {
		t.Fatal(err)
	}
}

// TestMapperIsRefused: a migration is refused if another process maps the VM's RAM, before the migration or after it
// was prepared, at the source or at the destination. The error names the process and the file. The VM is not touched.
func TestMapperIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	own, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	words := []string{
		fmt.Sprintf("process %d (%s) maps its file", os.Getpid(), bytes.TrimSpace(own)), s.vm.RAMFiles()[0],
		"end that process",
	}
	mapped := mapRAM(t, s.vm, l.A)
	s.refusedByBoth(nil, words)
	unmap(t, mapped)
	s.acceptedByCheck(nil)
	for id, host := range map[string]*lab.Host{"at-the-source": l.A, "at-the-destination": l.B} {
		t.Run(id, func(t *testing.T) {
			s := *s
			s.T = t
			client := s.prepare(id)
			mapped := mapRAM(t, s.vm, host)
			defer unmap(t, mapped)
			start(t, client, id, nil)
			m := awaitEnd(t, client, id)
			s.failed(m, stateFailed, append(words, "the VM was not touched")...)
			s.countsAtSource()
			s.destinationGone(id)
		})
	}
	migrate(t, l.A, l.B, "then")
	s.arrived()
}

// TestForeignReader maps the VM's RAM at the destination after the last check for such mappings, and reads all of it
// until the migration ends. A read of a missing page gets zeros, and the migration counts that page as touched. The VM
// has its memory nevertheless, and so has the mapping in the end.
func TestForeignReader(t *testing.T) {
	t.Parallel()
	const delay = time.Millisecond
	l := linkedHosts(t, lab.Link{Rate: 1e9, Delay: delay})
	for _, h := range l.Hosts() {
		startDaemon(t, h)
	}
	s := newScene(t, l)
	client := control(t, l.A)
	// At this rate, the migration takes half a minute: it is not over before the reader has begun.
	l.AB.Set(lab.Link{Rate: 1e6, Delay: delay})
	start(t, client, "read", s.spec())
	follow(t, client, "read", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	mapped := mapRAM(t, s.vm, l.B)
	defer unmap(t, mapped)
	stop := readAll(mapped)
	defer stop()
	l.AB.Set(lab.Link{Rate: 1e9, Delay: delay})
	m := follow(t, client, "read", func(*migratedv1.Migration) bool { return false })
	passes, sum := stop()
	p := m.GetProgress()
	t.Logf("%d passes, sum %d; %d pages were touched, of %d; %d faults",
		passes, sum, p.GetPagesTouched(), p.GetPagesTotal(), p.GetFaults())
	if m.GetState() != stateCompleted ||
		p.GetPagesTouched() == 0 || p.GetPagesUnexplained() != 0 {
		t.Errorf("migration is %v, %d pages were touched, %d are unexplained: %v", m.GetState(), p.GetPagesTouched(),
			p.GetPagesUnexplained(), m.GetError())
	}
	command(t, l.B, "stop") // the guest writes its memory all the time
	held, err := os.ReadFile(l.B.Path(s.vm.RAMFiles()[0]))
	if err != nil || !bytes.Equal(mapped, held) {
		t.Errorf("the reader's mapping differs from the VM's memory: %v", err)
	}
	command(t, l.B, "cont")
	s.arrived()
}

// readAll reads from each page of mapped, and returns. It reads from them again and again until stop is called. stop
// returns how often all pages were read, and the sum of the bytes. When it returns, nothing reads any more. It may be
// called again.
func readAll(mapped []byte) (stop func() (passes int, sum byte)) {
	var over atomic.Bool
	var reading sync.WaitGroup
	var passes int
	var sum byte
	read := func() {
		for at := 0; at < len(mapped); at += os.Getpagesize() {
			sum += mapped[at]
		}
		passes++
	}
	read()
	reading.Go(func() {
		for !over.Load() {
			read()
		}
	})
	return func() (int, byte) {
		over.Store(true)
		reading.Wait()
		return passes, sum
	}
}

// TestVhostUserIsRefused: a VM with a vhost-user disk, which another process serves, is refused. The error names the
// device.
func TestVhostUserIsRefused(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	l := newLab(t)
	log, err := os.Create(l.A.Path(lab.VMDir + "/backend.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	const socket = lab.VMDir + "/disk.sock"
	if _, err := l.A.Start(log, "qemu-storage-daemon", "--blockdev", "null-co,node-name=disk,size=1048576,read-zeroes=on",
		"--export", "vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path="+socket); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, l.A.Path(socket))
	s := sceneOf(t, l, lab.VMConfig{Extra: []string{
		"-chardev", "socket,id=served,path=" + socket, "-device", "vhost-user-blk-pci,id=blk,chardev=served",
	}}.WithDevices(1, 1))
	s.refusedByBoth(nil, []string{"/machine/peripheral/blk (vhost-user-blk-pci)", "another process", "unplug"})
}

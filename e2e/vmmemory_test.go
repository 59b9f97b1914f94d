// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// block returns the VM's RAM block whose ID ends in name.
func block(t *testing.T, vm *qemu.VM, name string) ram.Block {
	t.Helper()
	blocks, err := vm.RAM.Blocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b ram.Block) bool { return strings.HasSuffix(b.ID, name) })
	if at < 0 {
		t.Fatalf("the VM has no memory %q", name)
	}
	return blocks[at]
}

// memoryOf opens the memory of a QEMU process.
func memoryOf(t *testing.T, vm *qemu.VM) *os.File {
	t.Helper()
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestVideoMemoryFollows: video memory moves like any other memory, not with the device state. So a large screen on a
// slow network neither delays the stop nor lengthens it. What the guest has drawn arrives.
func TestVideoMemoryFollows(t *testing.T) {
	t.Parallel()
	l := linkedHosts(t, lab.Link{Rate: 50e6, Delay: 100 * time.Microsecond})
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	vm := lab.VMConfig{
		Backend: lab.BackendDefault, Extra: []string{"-device", "VGA,vgamem_mb=64,id=screen"},
	}.WithDevices(1, 1)
	vm.VGA = false // Extra has one
	s := sceneOf(t, l, vm)
	source := inspect(t, l.A)
	vram := block(t, source, "/vga.vram")
	if vram.Size != 64<<20 {
		t.Fatalf("video memory %+v", vram)
	}
	drawn := make([]byte, 16<<20) // the rest is zero
	_, _ = rand.Read(drawn)
	if _, err := memoryOf(t, source).WriteAt(drawn, int64(vram.Addr)+8<<20); err != nil {
		t.Fatal(err)
	}
	m := migrate(t, l.A, l.B, "screen")
	if n := m.GetProgress().GetBytesDeviceState(); n > 1<<20 {
		t.Errorf("%d bytes crossed while the VM stood still", n)
	}
	destination := inspect(t, l.B)
	got := make([]byte, len(drawn))
	if _, err := memoryOf(t, destination).ReadAt(
		got, int64(block(t, destination, "/vga.vram").Addr)+8<<20,
	); err != nil || !bytes.Equal(got, drawn) {
		t.Errorf("what was drawn has not arrived: %v", err)
	}
	s.arrived()
	t.Logf("downtime %v, all memory after %v",
		m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetResidency().AsDuration())
}

// TestFirmwareVariablesArrive: the variables that the firmware keeps in its flash are there after a move, in memory and
// in the image of the flash.
func TestFirmwareVariablesArrive(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	vm := lab.VMConfig{Backend: lab.BackendDefault, VCPUs: 1, MemoryMiB: 64, UEFI: true}
	vm = emptyDisk(t, vm)
	if _, err := l.A.StartVM(testContext(t), vm, lab.EventsArgs()...); errors.Is(err, lab.ErrNoFirmware) {
		testenv.CannotRun(t, "%v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	source := inspect(t, l.A)
	mark := []byte("a variable that the firmware has set")
	const at = 256 << 10 // a part of the flash that the firmware leaves alone
	if _, err := memoryOf(t, source).WriteAt(mark, int64(block(t, source, "system.flash1").Addr)+at); err != nil {
		t.Fatal(err)
	}
	migrate(t, l.A, l.B, "firmware")
	destination := inspect(t, l.B)
	got := make([]byte, len(mark))
	if _, err := memoryOf(t, destination).ReadAt(
		got, int64(block(t, destination, "system.flash1").Addr)+at,
	); err != nil || !bytes.Equal(got, mark) {
		t.Errorf("the flash holds %q, %v", got, err)
	}
	// QEMU writes the flash to its image after it has loaded the state.
	if text, err := os.ReadFile(l.Shared(lab.SharedDir + "/guest-vars.fd")); err != nil || !bytes.Contains(text, mark) {
		t.Errorf("the image does not hold the variable: %v", err)
	}
}

// TestMemoryThatWasPromised: if a VM's memory was preallocated or is locked, all of it is allocated after a move, and
// after the next one.
func TestMemoryThatWasPromised(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"prealloc": {"-object", "memory-backend-ram,id=ram0,size=64M,prealloc=on", "-machine", "memory-backend=ram0"},
		"shared": {
			"-object", "memory-backend-file,id=ram0,size=64M,prealloc=on,share=on,mem-path=/dev/shm/promised",
			"-machine", "memory-backend=ram0",
		},
		"mem-lock": {
			"-object", "memory-backend-ram,id=ram0,size=64M", "-machine", "memory-backend=ram0", "-overcommit", "mem-lock=on",
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, MemoryMiB: 64, Extra: args}.WithDevices(1, 1))
			from, to, pass := l.A, l.B, s.began
			for hop := range 2 {
				migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
				if missing := unpopulated(t, inspect(t, to), "ram0"); missing != 0 {
					t.Errorf("hop %d: %d bytes of the VM's memory are not there", hop, missing)
				}
				pass = s.arrivedAfter(to, pass)
				from, to = to, from
			}
		})
	}
}

// unpopulated returns how many bytes of a block have no page.
func unpopulated(t *testing.T, vm *qemu.VM, name string) (bytes uint64) {
	t.Helper()
	b := block(t, vm, name)
	if b.Path != "" && !b.Private {
		var st unix.Stat_t
		if err := unix.Stat(b.Path, &st); err != nil {
			t.Fatal(err)
		}
		return b.Size - min(b.Size, uint64(st.Blocks)*512)
	}
	pages, err := uffd.OpenPagemap(vm.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer pages.Close()
	for at := b.Addr; at < b.Addr+b.Size; at += 4096 {
		next, err := pages.Next(at, b.Addr+b.Size)
		if err != nil {
			t.Fatal(err)
		}
		bytes += next - at
		at = next
	}
	return bytes
}

// TestPluggedMemoryMoves: memory that was plugged in while the VM ran is not on QEMU's command line. A destination
// without it is refused before the VM is touched. If a template adds it, the VM moves.
func TestPluggedMemoryMoves(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{
		Backend: lab.BackendDefault, Extra: []string{"-m", "32M,slots=2,maxmem=1G"},
	}.WithDevices(1, 1))
	ask(t, l.A, "object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "extra", "size": 128 << 20}, nil)
	ask(t, l.A, "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "extra"}, nil)
	source := inspect(t, l.A)
	mark := []byte("in the memory that was plugged in")
	if _, err := memoryOf(t, source).WriteAt(mark, int64(block(t, source, "extra").Addr)+5<<20); err != nil {
		t.Fatal(err)
	}
	s.failed(migrateSpec(t, l.A, "lacking", s.spec()), stateFailed,
		`no RAM "extra"`, "--template", "the VM was not touched")
	s.writeTemplate("{{range .Args}}{{.}}\n{{end}}" +
		"-object\nmemory-backend-ram,id=extra,size=128M\n-device\npc-dimm,id=dimm1,memdev=extra\n")
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	completed(t, migrateSpec(t, l.A, "given", spec))
	destination := inspect(t, l.B)
	got := make([]byte, len(mark))
	if _, err := memoryOf(t, destination).ReadAt(
		got, int64(block(t, destination, "extra").Addr)+5<<20,
	); err != nil || !bytes.Equal(got, mark) {
		t.Errorf("it holds %q, %v", got, err)
	}
	s.countsAtDestination()
}

// TestReadOnlyImageIsLeftAlone: the image of an nvdimm that the guest cannot write must be the same on both hosts, or
// the move is refused. The move does not change it.
func TestReadOnlyImageIsLeftAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	content := bytes.Repeat([]byte("an image "), 1<<20)[:8<<20]
	for _, h := range l.Hosts() {
		if err := h.MakeVMDir(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(h.Path("/run/vm/image"), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{
		"-m", "32M,slots=2,maxmem=1G", "-machine", "nvdimm=on",
		"-object", "memory-backend-file,id=nv,size=8M,share=on,readonly=on,mem-path=/run/vm/image",
		"-device", "nvdimm,id=nv1,memdev=nv,unarmed=on",
	}}.WithDevices(1, 1))
	if err := os.WriteFile(l.B.Path("/run/vm/image"), bytes.ToUpper(content), 0o644); err != nil {
		t.Fatal(err)
	}
	s.failed(migrateSpec(t, l.A, "another", s.spec()), stateFailed,
		"holds something else", "the same image", "the VM was not touched")
	if err := os.WriteFile(l.B.Path("/run/vm/image"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	migrate(t, l.A, l.B, "same")
	s.countsAtDestination()
	for _, h := range l.Hosts() {
		if text, err := os.ReadFile(h.Path("/run/vm/image")); err != nil || !bytes.Equal(text, content) {
			t.Errorf("the image of host %s was changed: %v", h.Name, err)
		}
	}
}

// TestNeighbourIsLeftAlone: if another QEMU of the destination uses a RAM file of the same name, the move is refused,
// and that file is not emptied.
func TestNeighbourIsLeftAlone(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	neighbour := s.vm
	neighbour.Disks, neighbour.NICs = 0, 0 // the VM's own are in use
	args := neighbour.Args()
	for i := range args { // its own sockets, the VM's RAM file
		args[i] = strings.NewReplacer("qmp.sock", "neighbour.sock", "serial.", "neighbour-serial.").Replace(args[i])
	}
	log, err := os.Create(l.B.Path("/run/vm/neighbour.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	disk, err := os.ReadFile(s.vm.Disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.B.Path("/run/vm/disk"), disk, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.B.Start(log, args...); err != nil {
		t.Fatal(err)
	}
	counts := func(least uint64) uint64 {
		t.Helper()
		return passIn(t, l.B.Path("/run/vm/neighbour-serial.log"), func(pass uint64) bool { return pass >= least })
	}
	before := counts(2)
	m := migrateSpec(t, l.A, "crowded", s.spec())
	if says := m.GetError().GetMessage(); m.GetState() != stateFailed || !strings.Contains(says, "maps its file") {
		t.Errorf("migration is %v: %s", m.GetState(), says)
	}
	counts(before + 2)
	s.countsAtSource()
}

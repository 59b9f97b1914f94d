// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/pagesrv/pagemap"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// sceneOf boots the bare-metal guest with private memory and what else a VM may have.
func sceneOf(t *testing.T, l *lab.Lab, vm lab.VMConfig) *scene {
	t.Helper()
	vm.VCPUs, vm.MemoryMiB = 1, max(32, vm.MemoryMiB)
	vm = metal(t, vm)
	startVM(t, l.A, vm, lab.EventsArgs()...)
	return &scene{T: t, lab: l, vm: vm, began: metalPass(t, l.A, func(pass uint64) bool { return pass >= 2 })}
}

// inspect looks into the QEMU of the host's VM, beside the daemon.
func inspect(t *testing.T, h *lab.Host) *qemu.VM {
	t.Helper()
	vm, err := qemu.Attach(testContext(t), h.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return vm
}

// block finds memory of a VM by the end of its name.
func block(t *testing.T, vm *qemu.VM, name string) qemu.RAMBlock {
	t.Helper()
	blocks, err := vm.RAMBlocks(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(blocks, func(b qemu.RAMBlock) bool { return strings.HasSuffix(b.ID, name) })
	if at < 0 {
		t.Fatalf("the VM has no memory %q", name)
	}
	return blocks[at]
}

// memoryOf opens the memory of a QEMU.
func memoryOf(t *testing.T, vm *qemu.VM) *os.File {
	t.Helper()
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", vm.Pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// ask runs a QMP command on the VM's second monitor.
func ask(t *testing.T, h *lab.Host, command string, args, result any) {
	t.Helper()
	client, err := qmp.Dial(testContext(t), h.Path(lab.EventsPath))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(client.Do(testContext(t), command, args, result), client.Disconnect()); err != nil {
		t.Fatal(err)
	}
}

// TestPausedVMWithDiskGoesOn moves a VM that is paused and has a writable disk from host to host, and on: a QEMU that
// has not got its disks would abort when it is asked to give them up.
func TestPausedVMWithDiskGoesOn(t *testing.T) {
	needRealVM(t)
	for _, version := range lab.QEMUVersions {
		t.Run(version, func(t *testing.T) {
			l := newHosts(t)
			for _, h := range []*lab.Host{l.A, l.B} {
				useQEMU(t, h, version)
				startDaemon(t, h)
			}
			s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Disks: 2})
			command(t, l.A, "stop")
			from, to := l.A, l.B
			for hop := range 4 {
				migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
				if status := vmStatus(t, to); status != "paused" {
					t.Fatalf("hop %d: the VM is %q", hop, status)
				}
				from, to = to, from
			}
			command(t, from, "cont")
			metalPass(t, from, func(pass uint64) bool { return pass > s.began+1 })
			checkMetal(t, s.vm, from)
		})
	}
}

// TestPausedVMThatDoesNotLoad: it stays what it was, paused, and can be moved.
func TestPausedVMThatDoesNotLoad(t *testing.T) {
	needRealVM(t)
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Disks: 1, RNG: true})
	command(t, l.A, "stop")
	s.template("{{range .Args}}{{replace \"virtio-rng-pci,id=rng,rng=random\" \"virtio-balloon-pci\" .}}\n{{end}}")
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	for _, id := range []string{"first", "second"} { // it has given its disks up by then
		m := migrateSpec(t, l.A, id, spec)
		if m.GetState() != stateFailed || !strings.Contains(m.GetError().GetVmStatus(), "paused on the source") {
			t.Errorf("migration is %v: %v", m.GetState(), m.GetError())
		}
		if status := vmStatus(t, l.A); status != "paused" {
			t.Errorf("the VM is %q", status)
		}
	}
	migrate(t, l.A, l.B, "third")
	command(t, l.B, "cont")
	s.arrived()
}

// useQEMU gives a host a version of QEMU.
func useQEMU(t *testing.T, h *lab.Host, version string) {
	t.Helper()
	if version != lab.InstalledQEMU {
		if _, err := emulator.Dir(testContext(t), version); err != nil {
			cannot.Run(t, "%v", err)
		}
	}
	if err := h.UseQEMU(testContext(t), version); err != nil {
		t.Fatal(err)
	}
}

// TestNewerQEMU moves a VM of an old machine type to a newer QEMU, and that one's to the newest.
func TestNewerQEMU(t *testing.T) {
	needRealVM(t)
	for _, versions := range [][2]string{{"7.2", "10.0"}, {"7.2", "11.1"}, {"10.0", "11.1"}} {
		t.Run(versions[0]+" to "+versions[1], func(t *testing.T) {
			l := newHosts(t)
			for i, h := range []*lab.Host{l.A, l.B} {
				useQEMU(t, h, versions[i])
				startDaemon(t, h)
			}
			s := sceneOf(t, l, lab.VMConfig{
				Backend: lab.BackendDefault, Disks: 2, NICs: 2, RootPorts: true, VGA: true, RNG: true, Balloon: true,
				Extra: []string{"-machine", "pc-q35-7.2"},
			})
			checkVersion(t, l.A, versions[0])
			migrate(t, l.A, l.B, "newer")
			checkVersion(t, l.B, versions[1])
			s.arrived()
		})
	}
}

// TestManyDevices moves a VM with eight disks and eight network cards, each behind a port of its own, that its guest
// drives.
func TestManyDevices(t *testing.T) {
	needRealVM(t)
	l := newLab(t)
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	startVM(t, l.A, lab.RealVM(kernel, initrd, 256, 8, 8, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500"))
	var guest report.Log
	port := openGuest(t, l.A, &guest)
	if _, err := guest.WaitReady(testContext(t)); err != nil {
		t.Fatal(err)
	}
	from, to := l.A, l.B
	for hop := range 4 {
		awaitBlocks(t, &guest, writesOf(guest.Disks())+20)
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		m := migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
		port = openGuest(t, to, &guest)
		awaitBlocks(t, &guest, writesOf(guest.Disks())+20)
		verified, err := port.Verify(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		if verified.Found != 0 || verified.BlocksFound != 0 || verified.Blocks == 0 || guest.Err() != nil {
			t.Fatalf("the guest found damage: %+v, %v", verified, guest.Err())
		}
		t.Logf("downtime %v, %d bytes of device state", m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetBytesDeviceState())
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// TestVideoMemoryFollows: a large screen on a slow network neither delays the stop nor lengthens it, because it is
// memory like any. What the guest has drawn arrives.
func TestVideoMemoryFollows(t *testing.T) {
	l := linkedHosts(t, lab.Link{Rate: 50e6, Delay: 100 * time.Microsecond})
	startDaemon(t, l.A)
	startDaemon(t, l.B)
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{"-device", "VGA,vgamem_mb=64,id=screen"}})
	source := inspect(t, l.A)
	vram := block(t, source, "/vga.vram")
	if vram.Size != 64<<20 {
		t.Fatalf("video memory %+v", vram)
	}
	drawn := make([]byte, 16<<20) // and the rest is zero
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
	if _, err := memoryOf(t, destination).ReadAt(got, int64(block(t, destination, "/vga.vram").Addr)+8<<20); err != nil || !bytes.Equal(got, drawn) {
		t.Errorf("what was drawn has not arrived: %v", err)
	}
	s.arrived()
	t.Logf("downtime %v, all memory after %v", m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetResidency().AsDuration())
}

// TestFirmwareVariablesArrive: what the firmware keeps in its flash is there after a move, in memory and in its image.
func TestFirmwareVariablesArrive(t *testing.T) {
	l := newLab(t)
	vm := lab.VMConfig{Backend: lab.BackendDefault, VCPUs: 1, MemoryMiB: 64, UEFI: true}
	vm = emptyDisk(t, vm)
	if _, err := l.A.StartVM(testContext(t), vm, lab.EventsArgs()...); errors.Is(err, lab.ErrNoFirmware) {
		cannot.Run(t, "%v", err)
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
	if _, err := memoryOf(t, destination).ReadAt(got, int64(block(t, destination, "system.flash1").Addr)+at); err != nil || !bytes.Equal(got, mark) {
		t.Errorf("the flash holds %q, %v", got, err)
	}
	// QEMU writes the flash to its image when it has loaded.
	if text, err := os.ReadFile(l.Shared(lab.SharedDir + "/guest-vars.fd")); err != nil || !bytes.Contains(text, mark) {
		t.Errorf("the image does not hold the variable: %v", err)
	}
}

// TestMemoryThatWasPromised: a VM that was preallocated, or whose memory is locked, has all of it after a move, and so
// it is after the next one.
func TestMemoryThatWasPromised(t *testing.T) {
	for name, args := range map[string][]string{
		"prealloc": {"-object", "memory-backend-ram,id=ram0,size=64M,prealloc=on", "-machine", "memory-backend=ram0"},
		"shared":   {"-object", "memory-backend-file,id=ram0,size=64M,prealloc=on,share=on,mem-path=/dev/shm/promised", "-machine", "memory-backend=ram0"},
		"mem-lock": {"-object", "memory-backend-ram,id=ram0,size=64M", "-machine", "memory-backend=ram0", "-overcommit", "mem-lock=on"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, MemoryMiB: 64, Extra: args})
			from, to := l.A, l.B
			for hop := range 2 {
				migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
				if missing := unpopulated(t, inspect(t, to), "ram0"); missing != 0 {
					t.Errorf("hop %d: %d bytes of the VM's memory are not there", hop, missing)
				}
				metalPass(t, to, func(pass uint64) bool { return pass > s.began+1 })
				checkMetal(t, s.vm, to)
				from, to = to, from
			}
		})
	}
}

// unpopulated is how many bytes of a block the kernel has no page for.
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
	pages, err := pagemap.Open(vm.Pid)
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

// TestFreePageHints: a balloon with free-page-hint made QEMU's own migration, without RAM in it, end in a crash.
func TestFreePageHints(t *testing.T) {
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Extra: []string{"-object", "iothread,id=io", "-device", "virtio-balloon-pci,free-page-hint=on,iothread=io"}})
	migrate(t, l.A, l.B, "hints")
	s.arrived()
}

// TestSnapshotMeanwhile: a snapshot that is made while a migration is prepared has the VM's memory in it.
func TestSnapshotMeanwhile(t *testing.T) {
	needRealVM(t)
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Disks: 1})
	client := s.prepare("prepared")
	var said string
	ask(t, l.A, "human-monitor-command", map[string]string{"command-line": "savevm snap"}, &said)
	if said != "" {
		t.Fatalf("savevm: %s", said)
	}
	var drives []struct {
		Inserted *struct {
			Image struct {
				Snapshots []struct {
					Name string `json:"name"`
					Size int64  `json:"vm-state-size"`
				} `json:"snapshots"`
			} `json:"image"`
		} `json:"inserted"`
	}
	ask(t, l.A, "query-block", nil, &drives)
	var size int64 // of the VM, which is in one of its drives
	for _, d := range drives {
		if d.Inserted != nil {
			for _, snapshot := range d.Inserted.Image.Snapshots {
				size = max(size, snapshot.Size)
			}
		}
	}
	if size < 1<<20 {
		t.Errorf("the snapshot holds %d bytes of the VM", size)
	}
	s.cancel(client, "prepared")
	await(t, client, "prepared", func(*migratedv1.Migration) bool { return false })
	s.stillCounting()
}

// TestPluggedMemoryMoves: memory that was plugged in while the VM ran is not on its command line. The destination that
// lacks it is refused before the VM is touched, and one that was given it is not.
func TestPluggedMemoryMoves(t *testing.T) {
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{"-m", "32M,slots=2,maxmem=1G"}})
	ask(t, l.A, "object-add", map[string]any{"qom-type": "memory-backend-ram", "id": "extra", "size": 128 << 20}, nil)
	ask(t, l.A, "device_add", map[string]any{"driver": "pc-dimm", "id": "dimm1", "memdev": "extra"}, nil)
	source := inspect(t, l.A)
	mark := []byte("in the memory that was plugged in")
	if _, err := memoryOf(t, source).WriteAt(mark, int64(block(t, source, "extra").Addr)+5<<20); err != nil {
		t.Fatal(err)
	}
	s.failed(migrateSpec(t, l.A, "lacking", s.spec()), stateFailed, `no RAM "extra"`, "--template", "the VM was not touched")
	s.template("{{range .Args}}{{.}}\n{{end}}-object\nmemory-backend-ram,id=extra,size=128M\n-device\npc-dimm,id=dimm1,memdev=extra\n")
	spec := s.spec()
	spec.DestinationTemplate = templatePath
	if m := migrateSpec(t, l.A, "given", spec); m.GetState() != migratedv1.MigrationState_MIGRATION_STATE_COMPLETED {
		t.Fatalf("migration is %v: %v", m.GetState(), m.GetError())
	}
	destination := inspect(t, l.B)
	got := make([]byte, len(mark))
	if _, err := memoryOf(t, destination).ReadAt(got, int64(block(t, destination, "extra").Addr)+5<<20); err != nil || !bytes.Equal(got, mark) {
		t.Errorf("it holds %q, %v", got, err)
	}
	s.counts()
}

// TestReadOnlyImageIsLeftAlone: an nvdimm that the guest cannot write is the same image at both ends, or the move is
// refused.
func TestReadOnlyImageIsLeftAlone(t *testing.T) {
	l := newLab(t)
	content := bytes.Repeat([]byte("an image "), 1<<20)[:8<<20]
	for _, h := range []*lab.Host{l.A, l.B} {
		if err := h.MakeVMDir(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(h.Path("/run/vm/image"), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{
		"-m", "32M,slots=2,maxmem=1G", "-machine", "nvdimm=on", "-object", "memory-backend-file,id=nv,size=8M,share=on,readonly=on,mem-path=/run/vm/image",
		"-device", "nvdimm,id=nv1,memdev=nv,unarmed=on",
	}})
	if err := os.WriteFile(l.B.Path("/run/vm/image"), bytes.ToUpper(content), 0o644); err != nil {
		t.Fatal(err)
	}
	s.failed(migrateSpec(t, l.A, "another", s.spec()), stateFailed, "holds something else", "the same image", "the VM was not touched")
	if err := os.WriteFile(l.B.Path("/run/vm/image"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	migrate(t, l.A, l.B, "same")
	s.counts()
	for _, h := range []*lab.Host{l.A, l.B} {
		if text, err := os.ReadFile(h.Path("/run/vm/image")); err != nil || !bytes.Equal(text, content) {
			t.Errorf("the image of host %s was changed: %v", h.Name, err)
		}
	}
}

// TestNeighbourIsLeftAlone: a file of the VM's name that another QEMU of the destination has is not emptied.
func TestNeighbourIsLeftAlone(t *testing.T) {
	l := newLab(t)
	s := newScene(t, l)
	neighbour := s.vm
	neighbour.Extra = nil
	args := neighbour.Args()
	for i := range args { // its own sockets, the VM's RAM file
		args[i] = strings.NewReplacer("qmp.sock", "neighbour.sock", "serial.", "neighbour-serial.").Replace(args[i])
	}
	log, err := os.Create(l.B.Path("/run/vm/neighbour.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	if err := os.WriteFile(l.B.Path("/run/vm/disk"), mustRead(t, s.vm.Disk), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := l.B.Start(log, args...); err != nil {
		t.Fatal(err)
	}
	awaitFile(t, l.B.Path("/run/vm/neighbour-serial.log"))
	counts := func(more uint64) (last uint64) {
		t.Helper()
		ctx := testContext(t)
		for {
			if pass, found := lastPass(l.B.Path("/run/vm/neighbour-serial.log")); found && pass >= more {
				return pass
			}
			select {
			case <-ctx.Done():
				t.Fatal("the neighbour does not count")
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	before := counts(2)
	m := migrateSpec(t, l.A, "crowded", s.spec())
	if says := m.GetError().GetMessage(); m.GetState() != stateFailed || !strings.Contains(says, "maps its file") {
		t.Errorf("migration is %v: %s", m.GetState(), says)
	}
	counts(before + 2)
	s.countsOn()
}

// countsOn checks that the guest goes on at the source.
func (s *scene) countsOn() {
	s.Helper()
	now, _ := lastPass(s.lab.A.Path(lab.SerialLog))
	metalPass(s.T, s.lab.A, func(pass uint64) bool { return pass > now+1 })
	checkMetal(s.T, s.vm, s.lab.A)
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestUnmovableDevices: devices whose state QEMU cannot move are named before the VM is touched, because a save would
// leave them out in silence.
func TestUnmovableDevices(t *testing.T) {
	l := newLab(t)
	s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, Extra: []string{
		"-drive", "if=none,id=nvm,file=null-co://,format=raw,file.size=64M", "-device", "nvme,drive=nvm,serial=1",
	}})
	s.failed(migrateSpec(t, l.A, "nvme", s.spec()), stateFailed, "nvme", "unplug the device", "the VM was not touched")
}

// TestBitmapsAreNamed: a dirty bitmap that is in memory alone stays behind, which check says.
func TestBitmapsAreNamed(t *testing.T) {
	needRealVM(t)
	l := newLab(t)
	sceneOf(t, l, lab.VMConfig{Disks: 1})
	ask(t, l.A, "block-dirty-bitmap-add", map[string]any{"node": "disk0", "name": "nightly"}, nil)
	out, code := operate(t, l.A, "check", "--vm", lab.QMPPath, "--json")
	var answer struct {
		Results []struct {
			Detail string `json:"detail"`
		} `json:"results"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		t.Fatalf("%v: exit code %d: %s", err, code, out)
	}
	if !strings.Contains(out, "nightly") || !strings.Contains(out, "stays behind") {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// SPDX-License-Identifier: Apache-2.0

// Package twice has QEMU load the state of devices twice, each kind that this project loads early, in each version of QEMU.
package twice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/cannot"
	"github.com/migrated-vm/migrated/internal/devicestate"
	"github.com/migrated-vm/migrated/internal/qemu"
)

// machines have each device of devicestate.Twice, and more, between them.
var machines = []struct {
	name, machine string
	kvm           bool
	devices       func(*devices)
}{
	{"q35", "q35", false, func(d *devices) {
		d.network("virtio-net-pci", d.port())
		d.network("virtio-net-pci", d.port())
		d.add("virtio-blk-pci,drive="+d.image(), d.port())
		d.add("virtio-scsi-pci,id=scsi", d.port())
		d.add("scsi-hd,drive="+d.image(), "scsi.0")
		d.add("scsi-cd", "scsi.0")
		d.add("virtio-serial-pci", d.port())
		d.add("virtio-balloon-pci", d.port())
		d.add("virtio-rng-pci", d.port())
		d.add("virtio-keyboard-pci", "")
		d.add("virtio-gpu-pci", "")
		d.network("e1000e", d.port())
		d.network("e1000", "")
		d.network("rtl8139", "")
		d.network("vmxnet3", "")
		d.add("ide-hd,drive="+d.image(), "ide.0")
		d.add("lsi53c895a,id=lsi", "")
		d.add("scsi-hd,drive="+d.image(), "lsi.0")
		d.add("megasas,id=megasas", "")
		d.add("scsi-hd,drive="+d.image(), "megasas.0")
		d.add("pvscsi,id=pvscsi", "")
		d.add("scsi-hd,drive="+d.image(), "pvscsi.0")
		d.add("VGA", "")
		d.add("qemu-xhci,id=xhci", d.port())
		d.add("usb-tablet", "xhci.0")
		d.add("usb-kbd", "xhci.0")
		d.add("usb-hub", "xhci.0")
		d.add("usb-storage,drive="+d.image(), "xhci.0")
		d.add("ich9-usb-ehci1", "")
		d.add("ich9-usb-uhci1", "")
		d.args = append(d.args, "-audiodev", "none,id=sound", "-serial", "null")
		d.add("intel-hda", "")
		d.add("hda-output,audiodev=sound", "")
		d.add("AC97,audiodev=sound", "")
		d.add("i6300esb", "")
		d.add("pcie-pci-bridge", d.port())
		d.flash()
	}},
	{"pc", "pc", false, func(d *devices) {
		d.add("ide-hd,drive="+d.image(), "ide.0")
		d.add("virtio-blk-pci,drive="+d.image(), "")
		d.network("virtio-net-pci", "")
		d.add("cirrus-vga", "")
		d.add("piix3-usb-uhci", "")
	}},
	{"q35-kvm", "q35", true, func(d *devices) {
		d.network("virtio-net-pci", d.port())
		d.add("virtio-blk-pci,drive="+d.image(), d.port())
		d.add("virtio-vga", "")
	}},
}

// devices are arguments for QEMU.
type devices struct {
	t             *testing.T
	dir           string
	args          []string
	ports, others int
}

func (d *devices) add(device, bus string) {
	if bus != "" {
		device += ",bus=" + bus
	}
	d.args = append(d.args, "-device", device)
}

// port adds a PCI Express port and returns its name.
func (d *devices) port() string {
	name := fmt.Sprintf("port%d", d.ports)
	device := fmt.Sprintf("pcie-root-port,id=%s,chassis=%d,slot=%d,addr=%#x.%d", name, d.ports+1, d.ports+1, 0x18+d.ports/8, d.ports%8)
	if d.ports%8 == 0 {
		device += ",multifunction=on"
	}
	d.ports++
	d.args = append(d.args, "-device", device)
	return name
}

func (d *devices) network(card, bus string) {
	name := fmt.Sprintf("net%d", d.others)
	d.others++
	d.args = append(d.args, "-netdev", "hubport,hubid=1,id="+name)
	d.add(card+",netdev="+name, bus)
}

// image adds an image and returns its name.
func (d *devices) image() string {
	name := fmt.Sprintf("image%d", d.others)
	d.others++
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Truncate(path, 1<<20); err != nil {
		d.t.Fatal(err)
	}
	d.args = append(d.args, "-blockdev", "driver=raw,node-name="+name+",file.driver=file,file.filename="+path)
	return name
}

// flash puts the firmware into a flash that the guest can write.
func (d *devices) flash() {
	bios, err := os.ReadFile("/usr/share/seabios/bios-256k.bin")
	if err != nil {
		cannot.Run(d.t, "the firmware, of package seabios: %v", err)
	}
	path := filepath.Join(d.dir, "flash")
	if err := os.WriteFile(path, bios, 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.args = append(d.args, "-drive", "if=pflash,format=raw,file="+path)
}

// restless are sections that are not the same when they are saved twice, for a reason that is none of loading.
var restless = map[string]string{
	"mc146818rtc": "has the time of day",
	"e1000e":      "has timers that are armed when it is loaded, from the clock of then",
}

// TestLoadedTwice: a QEMU that has loaded the state of a VM which runs, and then all of it again as it has become, has the
// VM's state.
func TestLoadedTwice(t *testing.T) {
	for _, version := range lab.QEMUVersions {
		seen := map[string]bool{}
		for _, m := range machines {
			t.Run(version+"/"+m.name, func(t *testing.T) {
				accelerator := "tcg"
				if m.kvm {
					accelerator = "kvm"
					if _, err := os.Stat("/dev/kvm"); err != nil {
						t.Skipf("no KVM on this machine: %v", err)
					}
				}
				d := &devices{t: t, dir: shared(t)}
				m.devices(d)
				args := append([]string{command(t, version), "-machine", m.machine + ",memory-backend=ram", "-accel", accelerator}, d.args...)
				source := start(t, d.dir, args...)
				for _, s := range loadTwice(t, source, func() *qemu.VM {
					return start(t, d.dir, append(args, "-S", "-incoming", "defer")...)
				}) {
					seen[s.Device()] = true
				}
			})
		}
		if t.Failed() {
			return
		}
		for _, device := range devicestate.Twice() {
			if !seen[device] {
				t.Errorf("no machine of QEMU %s had a %q", version, device)
			}
		}
	}
}

// loadTwice returns the sections.
func loadTwice(t *testing.T, source *qemu.VM, startDestination func() *qemu.VM) []devicestate.Section {
	t.Helper()
	ctx := testContext(t)
	time.Sleep(2 * time.Second) // the firmware sets the devices up
	facts, err := source.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	head := append(devicestate.Head(facts.MachineType), devicestate.ReturnPath...)
	for try := 0; ; try++ {
		early := devicestate.Early(parse(t, saveRunning(t, source)))
		destination := load(t, startDestination())
		destination.feed(t, head, early)

		time.Sleep(300 * time.Millisecond) // it boots, or finds that it cannot
		if _, _, err := source.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		now := parse(t, save(t, source))
		changes, err := devicestate.AppendChanges(nil, early, now, func(int) bool { return true })
		if errors.Is(err, devicestate.ErrOtherForm) && try < 5 {
			t.Logf("try %d: %v", try, err)
			if _, err := source.Cont(ctx); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		list, err := devicestate.ParseChanges(early, changes)
		if err != nil {
			t.Fatal(err)
		}
		if err := destination.UnmapRootComplex(ctx); err != nil {
			t.Fatal(err)
		}
		var again []devicestate.Section
		for _, c := range list {
			again = append(again, c.Section)
		}
		destination.feed(t, nil, again)
		other := load(t, startDestination())
		other.feed(t, head, now)
		compareLoads(t, now, destination.saveAgain(t), other.saveAgain(t))
		if err := source.Quit(ctx); err != nil { // it has the disks
			t.Error(err)
		}
		if _, err := destination.Cont(ctx); err != nil {
			t.Error(err)
		}
		return now
	}
}

// compareLoads wants QEMU to have changed as little of what was loaded twice as of what was loaded once.
func compareLoads(t *testing.T, saved, twice, once []devicestate.Section) {
	t.Helper()
	changed := map[string]int{}
	for _, d := range devicestate.Compare(saved, once) {
		changed[d.Name] = d.Bytes
	}
	for _, d := range devicestate.Compare(saved, twice) {
		if restless[devicestate.Section{Name: d.Name}.Device()] == "" && d.Bytes != changed[d.Name] {
			t.Errorf("%d bytes of %q are others when they are saved again; of what was loaded once %d", d.Bytes, d.Name, changed[d.Name])
		}
	}
}

// A loader is a QEMU that loads.
type loader struct {
	*qemu.VM
	stream  *os.File
	loading *qemu.Loading
}

func load(t *testing.T, vm *qemu.VM) *loader {
	t.Helper()
	if err := vm.PrepareIncoming(testContext(t)); err != nil {
		t.Fatal(err)
	}
	theirs, ours := sockets(t)
	loading, err := vm.BeginLoading(testContext(t), theirs)
	if err != nil {
		t.Fatal(err)
	}
	return &loader{vm, ours, loading}
}

// saveAgain ends the stream, and saves what was loaded.
func (l *loader) saveAgain(t *testing.T) []devicestate.Section {
	t.Helper()
	if _, err := l.stream.Write(devicestate.End(nil)); err != nil {
		t.Fatal(err)
	}
	if err := l.loading.Wait(testContext(t)); err != nil {
		t.Fatal(err)
	}
	return parse(t, save(t, l.VM))
}

// feed writes sections and waits for each to be loaded.
func (l *loader) feed(t *testing.T, head []byte, sections []devicestate.Section) {
	t.Helper()
	for i, s := range sections {
		head = append(append(head, s.Bytes...), devicestate.Ping(uint32(i))...)
		if err := l.stream.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := l.stream.Write(head); err != nil {
			t.Fatalf("%s: %v", s.Name, err)
		}
		head = nil
		pong := devicestate.Pong(uint32(i))
		got := make([]byte, len(pong))
		if _, err := io.ReadFull(l.stream, got); err != nil || !bytes.Equal(got, pong) {
			t.Fatalf("QEMU did not load %q: it answered %x, %v", s.Name, got, err)
		}
	}
}

func parse(t *testing.T, state []byte) []devicestate.Section {
	t.Helper()
	sections, err := devicestate.Parse(state)
	if err != nil {
		t.Fatal(err)
	}
	return sections
}

// saveRunning saves as an early load does, and looks that the VM stood still and runs again.
func saveRunning(t *testing.T, vm *qemu.VM) []byte {
	t.Helper()
	for try := 0; ; try++ {
		saver := newSaver(t, vm)
		looked := 0
		state, pause, err := saver.SaveRunning(testContext(t), func() error { looked++; return nil })
		if closeErr := saver.Close(testContext(t)); closeErr != nil {
			t.Error(closeErr)
		}
		if errors.Is(err, qemu.ErrTooShort) && try < 20 {
			continue
		}
		if err != nil || looked != 1 || pause <= 0 {
			t.Fatalf("saved with a pause of %v, in which was looked %d times: %v", pause, looked, err)
		}
		if runs, err := vm.Running(testContext(t)); err != nil || !runs {
			t.Fatalf("the VM runs: %t, %v", runs, err)
		}
		return state
	}
}

func save(t *testing.T, vm *qemu.VM) []byte {
	t.Helper()
	saver := newSaver(t, vm)
	state, err := saver.Save(testContext(t), false, nil)
	if err := errors.Join(err, saver.Close(testContext(t))); err != nil {
		t.Fatal(err)
	}
	return state
}

func newSaver(t *testing.T, vm *qemu.VM) *qemu.Saver {
	t.Helper()
	saver, err := vm.NewSaver(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	return saver
}

// start starts a QEMU whose RAM is a file in dir: both have the same, which is not the subject here.
func start(t *testing.T, dir string, args ...string) *qemu.VM {
	t.Helper()
	socket, err := os.MkdirTemp("", "migrated-test-") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(socket) })
	socket = filepath.Join(socket, "qmp")
	cmd := exec.CommandContext(t.Context(), args[0], append([]string{
		"-nodefaults", "-display", "none", "-smp", "2", "-m", "64",
		"-object", "memory-backend-file,id=ram,size=64M,share=on,mem-path=" + filepath.Join(dir, "ram"),
		"-qmp", "unix:" + socket + ",server=on,wait=off",
	}, args[1:]...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		if t.Failed() && said.Len() > 0 {
			t.Logf("QEMU: %s", said.Bytes())
		}
	})
	var vm *qemu.VM
	for ctx := testContext(t); ; time.Sleep(10 * time.Millisecond) {
		if vm, err = qemu.Attach(ctx, socket); err == nil {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = vm.Close() }) // QEMU may have ended
	return vm
}

func command(t *testing.T, version string) string {
	t.Helper()
	if version == lab.InstalledQEMU {
		path, err := exec.LookPath("qemu-system-x86_64")
		if err != nil {
			cannot.Run(t, "%v", err)
		}
		return path
	}
	path, err := emulator.Command(testContext(t), version)
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	return path
}

// shared returns a directory in memory.
func shared(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "migrated-test-")
	if err != nil {
		cannot.Run(t, "%v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func sockets(t *testing.T) (theirs, ours *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fds[1], true); err != nil {
		t.Fatal(err)
	}
	theirs, ours = os.NewFile(uintptr(fds[0]), "theirs"), os.NewFile(uintptr(fds[1]), "ours")
	t.Cleanup(func() { theirs.Close(); ours.Close() })
	return theirs, ours
}

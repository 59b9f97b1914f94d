// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bytes"
	"encoding/binary"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/internal/qemu/qom"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestOutsideDevicesAreRefused checks that devices served from outside of QEMU are refused by the names of their types.
// A search for processes that map the memory is not enough: a back end maps it only when the guest's driver starts.
func TestOutsideDevicesAreRefused(t *testing.T) {
	path := qemutest.RAMFile(t)
	socket := filepath.Join(filepath.Dir(path), "blk")
	for _, test := range []struct {
		name, says string
		args       []string
	}{
		{"vhost-user-blk", "/machine/peripheral/blk (vhost-user-blk-pci) is served by another process (vhost-user)", []string{
			"-chardev", "socket,id=c,path=" + socket, "-device", "vhost-user-blk-pci,id=blk,chardev=c",
		}},
		{"ivshmem", "(ivshmem-plain) is memory that the VM shares", []string{
			"-object", "memory-backend-file,id=peer,size=1M,share=on,mem-path=" + path + ".peer",
			"-device", "ivshmem-plain,memdev=peer,master=on",
		}},
		{"tpm", "TPM chip is emulated by another process (swtpm)", []string{
			"-chardev", "socket,id=tpm,path=" + socket + ".tpm",
			"-tpmdev", "emulator,id=chip,chardev=tpm", "-device", "tpm-crb,tpmdev=chip",
		}},
		{"usb-host", "/machine/peripheral/key (usb-host) is a USB device of this host", []string{
			"-device", "qemu-xhci", "-device", "usb-host,id=key,vendorid=0x1209,productid=0xfffe",
		}},
		{"smart card", "(ccid-card-passthru) is a smart card", []string{
			"-device", "qemu-xhci", "-device", "usb-ccid", "-chardev", "null,id=card",
			"-device", "ccid-card-passthru,chardev=card",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			switch {
			case strings.HasPrefix(test.name, "vhost-user"):
				startBackend(t, socket)
			case test.name == "tpm":
				startTPM(t, socket+".tpm")
			}
			_, vm := qemutest.Start(t, append(qemutest.RAM(path), test.args...)...)
			found := find(VM(qemutest.Context(t), vm), "devices")
			if !slices.ContainsFunc(found, func(r Result) bool {
				return r.Status == Failed && strings.Contains(r.Detail, test.says) && r.Remedy != ""
			}) {
				t.Errorf("results %+v", found)
			}
		})
	}
}

// TestOutsideDisksAreRefused: a block driver that gives the VM's memory to a device is refused by its name. No host of
// tests has a device for one, so a harmless driver is taken for one.
func TestOutsideDisksAreRefused(t *testing.T) {
	for _, driver := range []string{
		"nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa",
	} {
		if !slices.Contains(outsideDrivers, driver) {
			t.Errorf("%s is not refused", driver)
		}
	}
	outsideDrivers = append(outsideDrivers, "null-co")
	defer func() { outsideDrivers = outsideDrivers[:len(outsideDrivers)-1] }()
	_, vm := qemutest.Start(t, append(qemutest.RAM(qemutest.RAMFile(t)), "-blockdev", "null-co,node-name=spare")...)
	found := find(VM(qemutest.Context(t), vm), "devices")
	if len(found) != 1 || found[0].Status != Failed || found[0].Remedy == "" ||
		!strings.HasPrefix(found[0].Detail, "block node spare (null-co://, driver null-co) is a disk of this host") {
		t.Errorf("results %+v", found)
	}
}

// TestOutsideObjectsAreRefused: these need hardware that hosts of tests have not got.
func TestOutsideObjectsAreRefused(t *testing.T) {
	for _, name := range []string{
		"vhost-user-backend", "cryptodev-vhost-user", "input-linux", "sev-guest", "sev-snp-guest", "tdx-guest",
	} {
		if o := outsideObjects[name]; o.is == "" || o.remedy == "" {
			t.Errorf("%s: %+v", name, o)
		}
	}
}

// TestRedirectedUSBIsRefused: a VM with usb-redir is moved, but not while a device is redirected to it.
func TestRedirectedUSBIsRefused(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "redir")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, vm := qemutest.Start(t, append(qemutest.RAM(qemutest.RAMFile(t)), "-device", "usb-ehci",
		"-chardev", "socket,id=c,path="+socket, "-device", "usb-redir,id=redir,chardev=c")...)
	ctx := qemutest.Context(t)
	if found := find(VM(ctx, vm), "devices"); len(found) != 1 || found[0].Status != OK {
		t.Errorf("nothing is redirected, results %+v", found)
	}
	peer, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if _, err := peer.Write(redirect()); err != nil {
		t.Fatal(err)
	}
	for attached := false; !attached; {
		if err := qom.Property(ctx, vm.QMP, "/machine/peripheral/redir", "attached", &attached); err != nil {
			t.Fatal(err) // when ctx ends, at the latest
		}
	}
	found := find(VM(ctx, vm), "devices")
	if len(found) != 1 || found[0].Status != Failed || found[0].Remedy == "" ||
		!strings.HasPrefix(found[0].Detail, "/machine/peripheral/redir (usb-redir) is a USB device that is redirected") {
		t.Errorf("results %+v", found)
	}
}

// redirect returns what redirects a USB device without endpoints of its own (usbredirproto.h).
func redirect() (stream []byte) {
	const hello, connect, interfaces, endpoints = 0, 1, 4, 5
	packet := func(kind uint32, content []byte) {
		for _, n := range []uint32{kind, uint32(len(content)), 0} {
			stream = binary.LittleEndian.AppendUint32(stream, n)
		}
		stream = append(stream, content...)
	}
	packet(hello, make([]byte, 64+4)) // a name and no capabilities
	oneInterface := make([]byte, 4+4*32)
	oneInterface[0], oneInterface[4+32] = 1, 0xff // of a class of its vendor's
	packet(interfaces, oneInterface)
	types := bytes.Repeat([]byte{0xff}, 32) // none
	types[0], types[16] = 0, 0              // control
	packet(endpoints, append(types, make([]byte, 2*32)...))
	packet(connect, []byte{2, 0, 0, 0, 0x09, 0x12, 0xfe, 0xff}) // high speed
	return stream
}

// startTPM serves a TPM at a socket.
func startTPM(t *testing.T, socket string) {
	t.Helper()
	binary, err := exec.LookPath("swtpm")
	if err != nil {
		testenv.CannotRun(t, "%v: it is in package swtpm", err)
	}
	cmd := exec.Command(binary, "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(), "--ctrl", "type=unixio,path="+socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	qemutest.AwaitFile(qemutest.Context(t), socket)
}

// startBackend serves a vhost-user disk of 1 MiB at a socket.
func startBackend(t *testing.T, socket string) {
	t.Helper()
	binary, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	cmd := exec.Command(binary, "--blockdev", "null-co,node-name=disk,size=1048576,read-zeroes=on",
		"--export", "vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path="+socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	qemutest.AwaitFile(qemutest.Context(t), socket)
}

func TestOutsideNetdev(t *testing.T) {
	const text = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n" +
		" \\ n0: index=0,type=vhost-user,vhost-user0 to socket\r\n" +
		"net1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n \\ n1: index=0,type=tap,fd=11\r\n" +
		"n2: index=1,type=vhost-vdpa,vhostvdpa0\r\n"
	found := outsideNetdev.FindAllStringSubmatch(text, -1)
	if len(found) != 2 || found[0][1] != "n0" || found[0][2] != "vhost-user" ||
		found[1][1] != "n2" || outsideType(found[1][2]) == nil {
		t.Errorf("found %q", found)
	}
}

// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/cannot"
)

// Another process is found that maps the VM's memory, however that has come by it, and named with what to do.
func TestCheckAlone(t *testing.T) {
	removed := ramFile(t)
	for _, test := range []struct {
		name string
		args []string
	}{
		{"file", ram(ramFile(t))},
		{"removed file", ram(removed)},
		{"memfd", []string{"-m", "64", "-object", "memory-backend-memfd,id=ram0,size=64M", "-machine", "memory-backend=ram0"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := start(t, append(test.args, "-S")...)
			if test.name == "removed file" {
				if err := os.Remove(removed); err != nil {
					t.Fatal(err)
				}
			}
			blocks, err := vm.RAMBlocks(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			at := slices.IndexFunc(blocks, func(b RAMBlock) bool { return b.ID == "ram0" })
			if err := vm.CheckAlone(blocks); err != nil {
				t.Fatal(err)
			}
			file, err := os.Open(blocks[at].Path)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			for _, kind := range []int{unix.MAP_SHARED, unix.MAP_PRIVATE} {
				mapped, err := unix.Mmap(int(file.Fd()), 32<<20, 4096, unix.PROT_READ, kind)
				if err != nil {
					t.Fatal(err)
				}
				var bad *RAMError
				err = vm.CheckAlone(blocks)
				self := Mapper{os.Getpid(), nameOf(os.Getpid())}
				if !errors.As(err, &bad) || bad.ID != "ram0" || bad.Remedy == "" ||
					!strings.Contains(bad.Reason, fmt.Sprintf("process %d (qemu.test)", self.PID)) || !strings.Contains(bad.Reason, blocks[at].File) {
					t.Errorf("error %v, of %v", err, self)
				}
				if found := find(CheckVM(testContext(t), vm), `RAM "ram0"`); len(found) != 1 || found[0].Status != Failed {
					t.Errorf("check says %+v", found)
				}
				if err := unix.Munmap(mapped); err != nil {
					t.Fatal(err)
				}
			}
			if err := vm.CheckAlone(blocks); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMapsFile(t *testing.T) {
	const key = " 00:1b 15 "
	for line, want := range map[string]bool{
		"7f00-7f10 rw-s 00000000 00:1b 15                         /dev/shm/ram\n":         true,
		"7f00-7f10 rw-s 00000000 00:1b 155                        /dev/shm/ram\n":         false,
		"7f00-7f10 rw-s 00000000 00:1c 15                         /dev/shm/ram\n":         false,
		"7f00-7f10 rw-s 00000000 00:1c 16                         /dev/shm/ 00:1b 15 a\n": false,
		"7f00-7f10 r--p 00:1b 15 \n": false,
		"":                           false,
		"7f00-7f10 rw-p 00000000 00:00 0 \n7f20-7f30 r--p 00002000 00:1b 15     a b\n": true,
	} {
		if got := mapsFile([]byte(line), []byte(key)); got != want {
			t.Errorf("%q: %t", line, got)
		}
	}
}

func TestSharesMemory(t *testing.T) {
	if !sharesMemory(os.Getpid(), os.Getpid()) {
		t.Error("a process has not its own memory")
	}
	if sharesMemory(os.Getpid(), os.Getppid()) {
		t.Error("a process has another's memory")
	}
}

// Devices that something outside of QEMU serves are refused by their names: a back end maps the memory only when the
// guest's driver begins.
func TestOutsideDevicesAreRefused(t *testing.T) {
	path := ramFile(t)
	socket := filepath.Join(filepath.Dir(path), "blk")
	for _, test := range []struct {
		name, says string
		args       []string
	}{
		{"vhost-user-blk", "/machine/peripheral/blk (vhost-user-blk-pci) is served by another process (vhost-user)", []string{
			"-chardev", "socket,id=c,path=" + socket, "-device", "vhost-user-blk-pci,id=blk,chardev=c",
		}},
		{"ivshmem", "(ivshmem-plain) is memory that the VM shares", []string{
			"-object", "memory-backend-file,id=peer,size=1M,share=on,mem-path=" + path + ".peer", "-device", "ivshmem-plain,memdev=peer,master=on",
		}},
		{"tpm", "TPM chip is another process's (swtpm)", []string{
			"-chardev", "socket,id=tpm,path=" + socket + ".tpm", "-tpmdev", "emulator,id=chip,chardev=tpm", "-device", "tpm-crb,tpmdev=chip",
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			switch {
			case strings.HasPrefix(test.name, "vhost-user"):
				startBackend(t, socket)
			case test.name == "tpm":
				startTPM(t, socket+".tpm")
			}
			_, vm := start(t, append(ram(path), test.args...)...)
			found := find(CheckVM(testContext(t), vm), "devices")
			if !slices.ContainsFunc(found, func(r Result) bool {
				return r.Status == Failed && strings.Contains(r.Detail, test.says) && r.Remedy != ""
			}) {
				t.Errorf("results %+v", found)
			}
		})
	}
}

// startTPM serves a TPM on a socket.
func startTPM(t *testing.T, socket string) {
	t.Helper()
	binary, err := exec.LookPath("swtpm")
	if err != nil {
		cannot.Run(t, "%v: it is in package swtpm", err)
	}
	cmd := exec.Command(binary, "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(), "--ctrl", "type=unixio,path="+socket)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	awaitFile(testContext(t), socket)
}

// startBackend serves a disk of 1 MiB with vhost-user on a socket.
func startBackend(t *testing.T, socket string) {
	t.Helper()
	binary, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		cannot.Run(t, "%v", err)
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
	awaitFile(testContext(t), socket)
}

func TestOutsideNetdev(t *testing.T) {
	const text = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n" +
		" \\ n0: index=0,type=vhost-user,vhost-user0 to socket\r\n" +
		"net1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\r\n \\ n1: index=0,type=tap,fd=11\r\n" +
		"n2: index=1,type=vhost-vdpa,vhostvdpa0\r\n"
	found := outsideNetdev.FindAllStringSubmatch(text, -1)
	if len(found) != 2 || found[0][1] != "n0" || found[0][2] != "vhost-user" || found[1][1] != "n2" || outsideType(found[1][2]) == nil {
		t.Errorf("found %q", found)
	}
}

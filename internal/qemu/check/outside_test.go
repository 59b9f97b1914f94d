// SPDX-License-Identifier: Apache-2.0

package check

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
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

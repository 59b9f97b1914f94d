// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	metalguest "github.com/migrated-vm/migrated/e2e/metal"
	"github.com/migrated-vm/migrated/internal/qmp"
)

const smallMiB = 64

// smallVM is one of several VMs on a host, with the bare-metal guest, which writes all of its memory over and over.
type smallVM struct{ name, disk string }

func (s smallVM) qmp() string { return lab.VMDir + "/" + s.name + ".qmp" }
func (s smallVM) ram() string { return "/dev/shm/" + s.name }

func (s smallVM) args(extra ...string) []string {
	return append([]string{
		// The guests write memory all the time. The daemons get the processors first.
		"nice", "-n", "19", "qemu-system-x86_64", "-name", s.name, "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35,memory-backend=ram", "-accel", "tcg", "-smp", "1", "-m", fmt.Sprintf("%dM", smallMiB),
		"-object", fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,share=on", smallMiB, s.ram()),
		"-qmp", "unix:" + s.qmp() + ",server=on,wait=off",
		"-serial", "file:" + lab.VMDir + "/" + s.name + ".log",
		"-drive", "file=" + s.disk + ",format=raw,if=none,id=boot,snapshot=on", "-device", "ide-hd,drive=boot,bus=ide.0",
	}, extra...)
}

// ask connects to the VM's QEMU on a host.
func (s smallVM) ask(ctx context.Context, h *lab.Host) (*qmp.Client, error) {
	return qmp.Dial(ctx, h.Path(s.qmp()))
}

// verify checks that the VM runs on a host, stops it, and reads its memory.
func (s smallVM) verify(t *testing.T, h *lab.Host) {
	t.Helper()
	ctx := testContext(t)
	client, err := s.ask(ctx, h)
	if err != nil {
		t.Errorf("%s is not at host %s: %v", s.name, h.Name, err)
		return
	}
	running, err := lab.Runs(ctx, client)
	if err := errors.Join(err, client.Do(ctx, "stop", nil, nil)); err != nil || !running {
		t.Errorf("%s at host %s: runs: %v, %v", s.name, h.Name, running, err)
	}
	if _, err := metalguest.Verify(h.Path(s.ram())); err != nil {
		t.Errorf("%s: memory on host %s: %v", s.name, h.Name, err)
	}
	if err := client.Disconnect(); err != nil {
		t.Error(err)
	}
}

// leaves waits until a host has no QEMU of the VM: nobody listens at its socket. It returns false if the VM runs there,
// or if ctx ends. A destination that was cut off ends a QEMU that it has prepared only after a while.
func (s smallVM) leaves(ctx context.Context, h *lab.Host) bool {
	for {
		client, err := s.ask(ctx, h)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return true
		}
		if err == nil {
			running, err := lab.Runs(ctx, client)
			_ = client.Disconnect() // the answer is all that counts
			if err == nil && running {
				return false
			}
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return false
		}
	}
}

// blocked is the name of a VM with a device that cannot migrate.
const blocked = "blocked"

// startSmall starts VMs on host A and waits until they write memory.
func startSmall(t *testing.T, l *lab.Lab, names ...string) (vms []smallVM) {
	t.Helper()
	ctx := testContext(t)
	disk, err := image.Metal(ctx, smallMiB)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	shared := l.Shared(lab.SharedDir + "/metal")
	if err := os.WriteFile(shared, content, 0o644); err != nil {
		t.Fatal(err)
	}
	log, err := os.CreateTemp(t.TempDir(), "qemu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("QEMUs: %s", text)
		}
	})
	for _, name := range names {
		vm := smallVM{name, lab.SharedDir + "/metal"}
		var extra []string
		if name == blocked {
			extra = []string{
				"-drive", "if=none,id=nvm,file=null-co://,format=raw,file.size=64M", "-device", "nvme,drive=nvm,serial=1",
			}
		}
		if _, err := l.A.Start(log, vm.args(extra...)...); err != nil {
			t.Fatal(err)
		}
		vms = append(vms, vm)
	}
	for _, vm := range vms {
		passIn(t, l.A.Path(lab.VMDir+"/"+vm.name+".log"), func(pass uint64) bool { return pass > 0 })
	}
	return vms
}

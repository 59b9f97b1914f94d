// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/launch"
	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
)

// startVM starts a QEMU in dir that is killed at the end of the test.
func startVM(t *testing.T, dir string, args ...string) *qemu.VM {
	t.Helper()
	own := t.TempDir()
	path := filepath.Join(own, "qmp")
	argv := append([]string{qemutest.Binary(t), "-nodefaults", "-display", "none", "-m", "32M", "-accel", "tcg",
		"-qmp", "unix:" + path + ",server=on,wait=off"}, args...)
	_, vm := qemutest.StartWith(t, nil, launch.Options{
		Args: argv, Credentials: qemutest.Self(),
		Dir: dir, QMPPath: path, PipePath: filepath.Join(own, "pipe"), LogPath: filepath.Join(own, "log"),
	})
	return vm
}

// A step is a QMP command at the source.
type step struct {
	command string
	args    any
}

// TestDescribeAndCompare compares a running QEMU with one that waits and was started from the same or a changed command
// line.
func TestDescribeAndCompare(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"disk", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	devices := []string{ // with and without ids, named and anonymous drives, a relative name, and a temporary file
		"-drive", "file=disk,format=raw,if=none,id=legacy,file.locking=off", "-device", "virtio-blk-pci,drive=legacy",
		"-drive", "file=" + dir + "/other,format=raw,if=none,id=scratch,snapshot=on",
		"-device", "ide-hd,drive=scratch,id=ide",
		"-drive", "if=none,media=cdrom,id=empty", "-device", "ide-cd,drive=empty,bus=ide.1",
		"-device", "virtio-scsi-pci,id=scsi", "-blockdev", "driver=null-co,node-name=null",
		"-device", "scsi-hd,drive=null,id=hd,lun=3",
		"-device", "nec-usb-xhci,id=usb", "-device", "usb-tablet,bus=usb.0",
		"-device", "VGA", "-device", "virtio-net-pci", "-cpu", "max", "-smp", "1,sockets=2,maxcpus=2",
	}
	const limited = "if=virtio,format=raw,file=null-co://,throttling.bps-total=1000000"
	const guid = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
	for _, c := range []struct {
		name   string
		source []string // besides devices
		waits  []string
		steps  []step
		want   []string
	}{
		{"pc", []string{"-machine", "pc"}, []string{"-machine", "pc"}, nil, nil},
		{"q35", []string{"-machine", "q35"}, []string{"-machine", "q35"}, nil, nil},
		{"runs", []string{"-machine", "pc"}, []string{"-machine", "pc"}, []step{{"cont", nil}}, nil},
		{"CPU plugged in", []string{"-machine", "pc"}, []string{"-machine", "pc"}, []step{{"device_add", map[string]any{
			"driver": "max-x86_64-cpu", "socket-id": 1, "core-id": 0, "thread-id": 0, "id": "second",
		}}}, []string{"socket-id 1", `"second" (max-x86_64-cpu`}},
		{"anonymous device plugged in", []string{"-machine", "pc"}, []string{"-machine", "pc"},
			[]step{{"device_add", map[string]any{"driver": "virtio-rng-pci", "addr": "0x1a"}}},
			[]string{"the destination lacks virtio-rng-pci pci.0 1a.0"}},
		{"anonymous device unplugged", []string{"-machine", "pc"},
			[]string{"-machine", "pc", "-device", "usb-mouse,bus=usb.0"}, nil,
			[]string{"the destination has usb-mouse usb.0,"}},
		{"device with an id unplugged", []string{"-machine", "pc"},
			[]string{"-machine", "pc", "-device", "virtio-scsi-pci,id=more"}, nil,
			[]string{`the destination has "more" (virtio-scsi-pci pci.0`}},
		{"another CPU", []string{"-machine", "pc"}, []string{"-machine", "pc", "-cpu", "max,-avx2"}, nil,
			[]string{"lack features"}},
		{"another machine", []string{"-machine", "pc"}, []string{"-machine", "pc,vmport=off"}, nil,
			[]string{"the source alone has vmmouse; vmport"}},
		{"throttled", []string{"-machine", "pc"}, []string{"-machine", "pc"}, []step{{"block_set_io_throttle", map[string]any{
			"id": "hd", "bps": 0, "bps_rd": 0, "bps_wr": 1000000, "iops": 50, "iops_rd": 0, "iops_wr": 0,
		}}}, []string{`"hd" has the throttling bps_wr 1000000, iops 50, group hd at the source and no throttling`}},
		{"throttled by the command line", []string{"-machine", "pc", "-drive", limited},
			[]string{"-machine", "pc", "-drive", limited}, nil, nil},
		{"generation id", []string{"-machine", "pc", "-device", "vmgenid,guid=" + guid},
			[]string{"-machine", "pc", "-device", "vmgenid,guid=" + guid}, nil, nil},
		{"another generation id", []string{"-machine", "pc", "-device", "vmgenid,guid=" + guid},
			[]string{"-machine", "pc", "-device", "vmgenid,guid=auto"}, nil, []string{"the source's is " + guid}},
	} {
		t.Run(c.name, func(t *testing.T) {
			running := startVM(t, dir, append(append([]string{"-S"}, devices...), c.source...)...)
			for _, s := range c.steps {
				if err := running.QMP.Do(t.Context(), s.command, s.args, nil); err != nil {
					t.Fatal(err)
				}
			}
			source, err := Describe(t.Context(), running)
			if err != nil {
				t.Fatal(err)
			}
			waiting := startVM(t, dir, append(append([]string{"-S", "-incoming", "defer"}, devices...), c.waits...)...)
			waits, err := Describe(t.Context(), waiting)
			if err != nil {
				t.Fatal(err)
			}
			found := Compare(source, waits, Destination{})
			if len(found) != len(c.want) {
				t.Fatalf("differences %+v, want %d", found, len(c.want))
			}
			for i, r := range found {
				if !strings.Contains(r.Detail, c.want[i]) {
					t.Errorf("difference %+v, want %q", r, c.want[i])
				}
			}
			again, err := Describe(t.Context(), running)
			if err != nil {
				t.Fatal(err)
			}
			if changed := Changed(source, again); len(changed) != 0 {
				t.Errorf("it has changed by itself: %+v", changed)
			}
		})
	}
}

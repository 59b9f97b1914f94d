// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// refusal is a reason why a VM cannot be moved as it is.
type refusal struct {
	name string
	// bring causes the refusal of a VM that can be moved.
	bring func(s *scene)
	// mend follows the remedy: the VM can be moved again.
	mend  func(s *scene)
	args  []string // more arguments of check and migrate
	words []string // in the output of both
}

// refusedByBoth checks that check and migrate refuse the VM, both with these words, and that the VM continues.
func (s *scene) refusedByBoth(args, words []string) {
	s.Helper()
	for _, name := range []string{"check", "migrate"} {
		out, code := operate(s.T, s.lab.A,
			append([]string{name, "--vm", lab.QMPPath, "--to", s.lab.B.DaemonAddr()}, args...)...)
		s.Logf("%s: exit code %d:\n%s", name, code, out)
		if code == 0 {
			s.Fatalf("%s says that all is well", name)
		}
		says := strings.Join(strings.Fields(out), " ")
		for _, word := range words {
			if !strings.Contains(says, word) {
				s.Errorf("%s does not say %q", name, word)
			}
		}
		if name == "migrate" && !strings.Contains(says, "the VM was not touched") {
			s.Errorf("%s does not say that the VM was not touched", name)
		}
	}
	s.countsAtSource()
}

// acceptedByCheck checks that a VM is no longer refused after the remedy.
func (s *scene) acceptedByCheck(args []string) {
	s.Helper()
	out, code := operate(s.T, s.lab.A,
		append([]string{"check", "--vm", lab.QMPPath, "--to", s.lab.B.DaemonAddr()}, args...)...)
	if code != 0 {
		s.Errorf("check: exit code %d after it was mended:\n%s", code, out)
	}
}

// goneJobs waits until no job is left.
func (s *scene) goneJobs() {
	s.Helper()
	s.until("query-jobs", nil, func(answer string) bool { return answer == "[]" })
}

// until repeats a command to the source's QEMU until wanted accepts the answer.
func (s *scene) until(command string, args any, wanted func(answer string) bool) {
	s.Helper()
	eventually(s.T, func() error {
		var answer json.RawMessage
		if ask(s.T, s.lab.A, command, args, &answer); !wanted(string(answer)) {
			return fmt.Errorf("%s still says %s", command, answer)
		}
		return nil
	})
}

// cancelJob cancels the job "copy".
func (s *scene) cancelJob() {
	s.Helper()
	ask(s.T, s.lab.A, "job-cancel", map[string]string{"id": "copy"}, nil)
	s.goneJobs()
}

// jobRefusals are block jobs, exports and bitmaps. They belong to QEMU and not to the VM, so a migration would lose
// them.
var jobRefusals = []refusal{
	{
		name: "mirror",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "drive-mirror", map[string]any{
				"job-id": "copy", "device": "disk0", "target": lab.SharedDir + "/mirror.qcow2", "sync": "full", "format": "qcow2",
			}, nil)
		},
		mend:  (*scene).cancelJob,
		words: []string{`the job "copy" (mirror`, "would be lost", "job-complete"},
	},
	{
		name: "backup",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "drive-backup", map[string]any{
				"job-id": "copy", "device": "disk0", "target": lab.SharedDir + "/backup.raw", "sync": "full",
				"format": "raw", "speed": 1,
			}, nil)
		},
		mend:  (*scene).cancelJob,
		words: []string{`the job "copy" (backup`, "would be lost", "job-cancel"},
	},
	{
		name: "NBD export",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "nbd-server-start", map[string]any{
				"addr": map[string]any{"type": "unix", "data": map[string]string{"path": lab.VMDir + "/nbd.sock"}},
			}, nil)
			ask(s.T, s.lab.A, "block-export-add", map[string]any{"type": "nbd", "id": "shown", "node-name": "disk0"}, nil)
		},
		mend:  func(s *scene) { ask(s.T, s.lab.A, "nbd-server-stop", nil, nil) },
		words: []string{`"disk0"`, `the export "shown" (nbd)`, "nbd-server-stop"},
	},
	{
		name: "dirty bitmap",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "block-dirty-bitmap-add", map[string]any{"node": "disk0", "name": "nightly"}, nil)
		},
		mend: func(s *scene) {
			ask(s.T, s.lab.A, "block-dirty-bitmap-remove", map[string]any{"node": "disk0", "name": "nightly"}, nil)
		},
		words: []string{`the dirty bitmap "nightly"`, `"disk0"`, "would be lost", "block-dirty-bitmap-remove"},
	},
}

// usbAndSCSI are buses whose devices are unplugged at once, without the help of the guest.
var usbAndSCSI = []string{
	"-device", "qemu-xhci,id=usb,addr=0x1c", "-device", "virtio-scsi-pci,id=scsi,addr=0x1d",
	"-device", "usb-tablet,id=tablet,bus=usb.0,port=1",
	"-blockdev", "driver=raw,node-name=disc1,read-only=on,file.driver=file,file.filename=" + lab.SharedDir + "/disc1.iso",
	"-device", "scsi-cd,id=cd,bus=scsi.0,drive=disc1",
}

// makeDiscs makes two CD images on the storage that the hosts share.
func makeDiscs(t *testing.T, l *lab.Lab) {
	t.Helper()
	for _, name := range []string{"disc1.iso", "disc2.iso"} {
		if err := os.WriteFile(l.Shared(lab.SharedDir+"/"+name), make([]byte, 1<<20), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// snapshot makes the VM write to an overlay of its disk from now on.
func (s *scene) snapshot() {
	s.Helper()
	ask(s.T, s.lab.A, "blockdev-snapshot-sync", map[string]string{
		"node-name": "disk0", "snapshot-node-name": "overlay", "snapshot-file": lab.SharedDir + "/overlay.qcow2",
	}, nil)
}

// merge commits the overlay into the image below it.
func (s *scene) merge() {
	s.Helper()
	ask(s.T, s.lab.A, "block-commit", map[string]string{"job-id": "copy", "device": "overlay"}, nil)
	s.completeJob()
}

// completeJob completes the job "copy", which waits for that once it is ready.
func (s *scene) completeJob() {
	s.Helper()
	s.until("query-jobs", nil, func(answer string) bool { return strings.Contains(answer, `"ready"`) })
	ask(s.T, s.lab.A, "job-complete", map[string]string{"id": "copy"}, nil)
	s.goneJobs()
}

// unplug unplugs a device from one of the buses of usbAndSCSI.
func (s *scene) unplug(id string) {
	s.Helper()
	ask(s.T, s.lab.A, "device_del", map[string]string{"id": id}, nil)
	s.until("qom-list", map[string]string{"path": "/machine/peripheral"}, func(answer string) bool {
		return !strings.Contains(answer, `"`+id+`"`)
	})
}

// throttle limits the VM's disk to that many bytes per second. 0: without a limit.
func (s *scene) throttle(bps int) {
	s.Helper()
	ask(s.T, s.lab.A, "block_set_io_throttle", map[string]any{
		"id":  "/machine/peripheral/disk0/virtio-backend",
		"bps": bps, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
	}, nil)
}

// changeRefusals are changes by which a VM differs from its command line.
var changeRefusals = []refusal{
	{
		name:  "snapshot",
		bring: (*scene).snapshot,
		mend:  (*scene).merge,
		words: []string{`the drive "disk0"`, "overlay.qcow2", "guest-disk0.qcow2", "--template"},
	},
	{
		name: "mirror that was completed",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "drive-mirror", map[string]any{
				"job-id": "copy", "device": "disk0", "target": lab.SharedDir + "/moved.qcow2", "node-name": "moved",
				"sync": "full", "format": "qcow2",
			}, nil)
			s.completeJob()
		},
		mend: func(s *scene) {
			ask(s.T, s.lab.A, "blockdev-del", map[string]string{"node-name": "disk0"}, nil) // no device has it any more
			ask(s.T, s.lab.A, "drive-mirror", map[string]any{
				"job-id": "copy", "device": "moved", "target": lab.SharedDir + "/guest-disk0.qcow2", "node-name": "disk0",
				"sync": "full", "format": "qcow2", "mode": "existing",
			}, nil)
			s.completeJob()
		},
		words: []string{`the drive "disk0"`, "moved.qcow2", "guest-disk0.qcow2", "--template"},
	},
	{
		name: "changed CD",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "blockdev-change-medium", map[string]string{
				"id": "cd", "filename": lab.SharedDir + "/disc2.iso",
			}, nil)
		},
		mend: func(s *scene) {
			ask(s.T, s.lab.A, "blockdev-change-medium", map[string]string{
				"id": "cd", "filename": lab.SharedDir + "/disc1.iso",
			}, nil)
		},
		words: []string{`the drive "cd"`, "disc2.iso", "disc1.iso", "--template"},
	},
	{
		name:  "ejected CD",
		bring: func(s *scene) { ask(s.T, s.lab.A, "eject", map[string]any{"id": "cd", "force": true}, nil) },
		mend: func(s *scene) {
			ask(s.T, s.lab.A, "blockdev-change-medium", map[string]string{
				"id": "cd", "filename": lab.SharedDir + "/disc1.iso",
			}, nil)
		},
		words: []string{`the drive "cd" has no medium at the source`, "disc1.iso", "--template"},
	},
	{
		name:  "throttled disk",
		bring: func(s *scene) { s.throttle(1 << 30) },
		mend:  func(s *scene) { s.throttle(0) },
		words: []string{`the drive "disk0" has the throttling bps 1073741824`, "--template", "block_set_io_throttle"},
	},
	{
		name: "disk that was plugged in",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "blockdev-add", map[string]any{"driver": "null-co", "node-name": "hot", "size": 1 << 20}, nil)
			ask(s.T, s.lab.A, "device_add", map[string]any{
				"driver": "scsi-hd", "id": "hot", "bus": "scsi.0", "drive": "hot", "lun": 5,
			}, nil)
		},
		mend:  func(s *scene) { s.unplug("hot") },
		words: []string{`the destination lacks "hot" (scsi-hd scsi.0 0:0:5)`, "--template", "unplug"},
	},
	{
		name:  "device that was unplugged",
		bring: func(s *scene) { s.unplug("tablet") },
		mend: func(s *scene) {
			ask(s.T, s.lab.A, "device_add", map[string]any{
				"driver": "usb-tablet", "id": "tablet", "bus": "usb.0", "port": "1",
			}, nil)
		},
		words: []string{`the destination has "tablet" (usb-tablet usb.0 1)`, "--template"},
	},
}

// TestRefusals checks that check and migrate refuse a VM that cannot be moved as it is, in the same words, before the
// VM is touched. After the remedy, check accepts the VM. In the end it moves.
func TestRefusals(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	makeDiscs(t, l)
	outer := sceneOf(t, l, lab.VMConfig{Extra: usbAndSCSI}.WithDevices(1, 1))
	for _, c := range append(jobRefusals, changeRefusals...) {
		t.Run(c.name, func(t *testing.T) {
			s := *outer
			s.T = t
			c.bring(&s)
			s.refusedByBoth(c.args, c.words)
			c.mend(&s)
			s.acceptedByCheck(c.args)
		})
	}
	migrate(t, l.A, l.B, "then")
	outer.arrived()
}

// later returns the words of the error if the change is found after the destination was prepared. If the VM has other
// devices by then, the destination is prepared once more, and compared as before.
func (r refusal) later() []string {
	if strings.Contains(r.name, "plugged") {
		return r.words
	}
	if slices.ContainsFunc(changeRefusals, func(o refusal) bool { return o.name == r.name }) {
		return []string{"after the destination was prepared", "migrate the VM again"}
	}
	return r.words
}

// TestRefusedLater makes the changes of TestRefusals between Prepare and Start, when an operator may still change the
// VM. The migration is refused, and the VM continues.
func TestRefusedLater(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	makeDiscs(t, l)
	outer := sceneOf(t, l, lab.VMConfig{Extra: usbAndSCSI}.WithDevices(1, 1))
	for _, c := range append(jobRefusals, changeRefusals...) {
		t.Run(c.name, func(t *testing.T) {
			s := *outer
			s.T = t
			id := strings.ReplaceAll(c.name, " ", "-")
			client := s.prepare(id)
			c.bring(&s)
			start(t, client, id, nil)
			m := awaitEnd(t, client, id)
			s.failed(m, stateFailed, append(c.later(), "the VM was not touched")...)
			c.mend(&s)
		})
	}
}

// TestSnapshotMoves: a VM whose disk has an overlay since a snapshot moves if a template names the overlay. The
// destination opens the image that the source had open.
func TestSnapshotMoves(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	s.snapshot()
	s.writeTemplate(`{{range .Args}}{{replace "guest-disk0.qcow2" "overlay.qcow2" .}}
{{end}}`)
	args := []string{"--to", l.B.DaemonAddr(), "--vm", lab.QMPPath, "--template", templatePath}
	for _, name := range []string{"check", "migrate"} {
		if out, code := operate(t, l.A, append([]string{name}, args...)...); code != 0 {
			t.Fatalf("%s: exit code %d:\n%s", name, code, out)
		}
	}
	s.arrived()
	if drives := string(command(t, l.B, "query-block")); !strings.Contains(
		drives, `"file": "`+lab.SharedDir+"/overlay.qcow2",
	) {
		t.Errorf("the destination has %s", drives)
	}
}

// TestPersistentBitmapMoves: a persistent dirty bitmap moves with its image and keeps recording at the destination.
func TestPersistentBitmapMoves(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := newScene(t, l)
	ask(t, l.A, "block-dirty-bitmap-add", map[string]any{"node": "disk0", "name": "nightly", "persistent": true}, nil)
	migrate(t, l.A, l.B, "bitmap")
	s.arrived()
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name      string `json:"name"`
			Recording bool   `json:"recording"`
		} `json:"dirty-bitmaps"`
	}
	client, err := l.B.QMP(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		client.Do(testContext(t), "query-named-block-nodes", nil, &nodes), client.Disconnect(),
	); err != nil {
		t.Fatal(err)
	}
	found := fmt.Sprint(nodes)
	if !strings.Contains(found, "{disk0 [{nightly true}]}") {
		t.Errorf("the destination has the nodes and bitmaps %s", found)
	}
}

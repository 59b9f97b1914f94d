// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/emulator"
	"github.com/migrated-vm/migrated/pkg/testenv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestDiskThatIsNotGivenUp: QEMU cannot write down what it has of an image when it is to give the image up. The VM is
// not run at the destination: it would have an image that lacks that, and the source's QEMU would write to it later.
func TestDiskThatIsNotGivenUp(t *testing.T) {
	for name, c := range map[string]struct {
		version string // of QEMU
		early   bool
		paused  bool
	}{
		"10":        {version: emulator.V10},
		"10 early":  {version: emulator.V10, early: true},
		"11":        {version: emulator.V11},
		"11 early":  {version: emulator.V11, early: true},
		"11 paused": {version: emulator.V11, paused: true},
	} {
		t.Run(name, func(t *testing.T) {
			command, err := emulator.Command(t.Context(), c.version)
			if err != nil {
				testenv.CannotRun(t, "%v", err)
			}
			p := &peer{run: runAtOnce, emulator: command}
			var s *stage
			if args := brokenDisk(t); c.early {
				s = newEarlyStage(t, p, args...)
			} else {
				s = newStageWith(t, t.Context(), p, args...)
			}
			s.command(t, "block-dirty-bitmap-add", map[string]any{"node": "disk", "name": "kept", "persistent": true}, nil)
			if c.paused {
				s.command(t, "stop", nil, nil)
			}
			s.source.Start()
			s.expect(t, migratedv1.MigrationState_MIGRATION_STATE_FAILED, "has not given all disks up")
			if view, _ := s.source.Snapshot(); !strings.Contains(view.GetError().GetRemedy(), "QEMU's log") {
				t.Errorf("it says %v", view.GetError())
			}
			if p.runRequest != nil || p.runs != 0 || s.vmRuns(t) == c.paused || s.handedOver(t) {
				t.Errorf("told %v, asked %d times", p.runRequest, p.runs)
			}
			var nodes []struct{ Active bool }
			s.command(t, "query-named-block-nodes", nil, &nodes)
			for _, n := range nodes {
				if !n.Active {
					t.Error("a disk was not taken back")
				}
			}
			s.noRecord(t)
		})
	}
}

// brokenDisk returns the arguments for two disks. Of the second one, QEMU cannot write to the image.
func brokenDisk(t *testing.T) []string {
	t.Helper()
	image := func(name string) string {
		path := filepath.Join(t.TempDir(), name)
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "16M").CombinedOutput(); err != nil {
			testenv.CannotRun(t, "qemu-img: %v: %s", err, out)
		}
		return path
	}
	return []string{
		"-blockdev", "driver=qcow2,node-name=other,file.driver=file,file.filename=" + image("other"),
		"-device", "virtio-blk-pci,drive=other",
		"-blockdev", "driver=qcow2,node-name=disk,file.driver=blkdebug,file.inject-error.0.event=none," +
			"file.inject-error.0.iotype=write,file.image.driver=file,file.image.filename=" + image("disk"),
		"-device", "virtio-blk-pci,drive=disk",
	}
}

// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/cgroup/cgrouptest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestMemoryLimit: a VM that is larger than the memory limit of the daemon's control group is refused before it is
// touched. Otherwise it would be killed in the middle of its migration. With --qemu-cgroup QEMU has a group of its own,
// and the VM arrives.
func TestMemoryLimit(t *testing.T) {
	const memory, limit = 256, 224 // MiB
	for _, own := range []bool{false, true} {
		t.Run(fmt.Sprintf("own group %v", own), func(t *testing.T) {
			path := fmt.Sprintf("/migrated-e2e-vms-%d", os.Getpid())
			group := cgrouptest.Limited(t, fmt.Sprintf("migrated-e2e-%d", os.Getpid()), limit<<20)
			t.Cleanup(func() { cgrouptest.RemoveAll(t, path) })
			l := newHosts(t) // after the groups: the lab ends before they are removed, and leaves them empty
			startDaemon(t, l.A)
			var args []string
			if own {
				args = []string{"--qemu-cgroup", path}
			}
			daemon := startDaemon(t, l.B, args...)
			for _, pid := range append(childrenOf(t, daemon.PID), strconv.Itoa(daemon.PID)) {
				if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(pid), 0); err != nil {
					t.Fatalf("process %s: %v", pid, err)
				}
			}
			s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, MemoryMiB: memory})
			spec := &migratedv1.MigrationSpec{Vm: lab.QMPPath, Destination: l.B.DaemonAddr()}
			m := migrateSpec(t, l.A, "m1", spec)
			if !own {
				said := m.GetError().GetMessage()
				if m.GetState() != stateFailed ||
					!strings.HasPrefix(m.GetError().GetVmStatus(), "the VM was not touched") ||
					!strings.Contains(m.GetError().GetRemedy(), "qemu_cgroup") {
					t.Errorf("the migration is %v: %v", m.GetState(), m.GetError())
				}
				for _, want := range []string{"it needs 3", group, fmt.Sprintf("is %d MiB)", limit)} {
					if !strings.Contains(said, want) {
						t.Errorf("%q is missing in %q", want, said)
					}
				}
				s.stillCounting()
				return
			}
			completed(t, m)
			metalPass(t, l.B, func(pass uint64) bool { return pass > s.began+1 })
			in, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", qemuOn(t, l.B)))
			if err != nil || !strings.Contains(string(in), path+"/migrated-m1") {
				t.Errorf("QEMU is in\n%s: %v", in, err)
			}
			checkMetal(t, s.vm, l.B)
		})
	}
}

// childrenOf returns all children of a process, whichever of its threads started them.
func childrenOf(t *testing.T, pid int) (children []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range all {
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err == nil && strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", pid)) {
			children = append(children, filepath.Base(dir))
		}
	}
	if len(children) == 0 {
		t.Fatal("the daemon has no process that starts QEMUs")
	}
	return children
}

// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// ofHosts returns the refusals whose reason is a host.
func ofHosts(l *lab.Lab) []refusal {
	resize := func(size string) func(*scene) {
		return func(s *scene) {
			s.Helper()
			if _, err := l.B.Run(testContext(s.T), "mount", "-o", "remount,size="+size, "/dev/shm"); err != nil {
				s.Fatal(err)
			}
		}
	}
	nothing := func(*scene) {}
	var neighbour net.Listener
	return []refusal{
		{
			name:  "small tmpfs",
			bring: resize("1m"),
			mend:  resize("50%"),
			words: []string{
				"the VM uses ", "MiB, and 1 MiB are left on the file system of /dev/shm/guest-ram0", "remount",
			},
		},
		{
			name: "neighbour's socket",
			bring: func(s *scene) {
				s.Helper()
				path := l.B.Path(lab.SerialPath)
				// A killed QEMU leaves its socket files behind.
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					s.Fatal(err)
				}
				var err error
				if neighbour, err = net.Listen("unix", path); err != nil {
					s.Fatal(err)
				}
			},
			mend:  func(*scene) { neighbour.Close() },
			words: []string{"another process listens at " + lab.SerialPath},
		},
		{
			name:  "own host",
			bring: nothing,
			mend:  nothing,
			args:  []string{"--to", l.A.DaemonAddr()},
			words: []string{"the destination is the VM's own host", "--to-qmp"},
		},
		{
			name:  "unsupervised",
			bring: nothing,
			mend:  nothing,
			args:  []string{"--require-secure"},
			words: []string{"--require-secure", "unsupervised"},
		},
	}
}

// TestRefusalsOfHosts checks that check and migrate refuse, in the same words, VMs that cannot be moved because of a
// host.
func TestRefusalsOfHosts(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	outer := sceneOf(t, l, lab.VMConfig{}.WithDevices(1, 1))
	for _, c := range ofHosts(l) {
		t.Run(c.name, func(t *testing.T) {
			s := *outer
			s.T = t
			c.bring(&s)
			s.refusedByBoth(c.args, c.words)
			c.mend(&s)
			s.acceptedByCheck(nil)
		})
	}
	t.Run("under way", func(t *testing.T) {
		s := *outer
		s.T = t
		client := s.prepare("first")
		for _, name := range []string{"check", "migrate"} {
			out, code := operate(t, l.A, name, "--vm", lab.QMPPath, "--to", l.B.DaemonAddr())
			for _, word := range []string{"is being migrated already, by migration first", "migrated watch first"} {
				if code == 0 || !strings.Contains(out, word) {
					t.Errorf("%s: exit code %d, %q is not said:\n%s", name, code, word, out)
				}
			}
		}
		cancel(t, client, "first")
		awaitEnd(t, client, "first")
	})
	migrate(t, l.A, l.B, "then")
	outer.arrived()
}

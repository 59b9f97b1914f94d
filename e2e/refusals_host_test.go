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
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
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
			bring: func(*scene) {},
			mend:  func(*scene) {},
			args:  []string{"--to", l.A.DaemonAddr()},
			words: []string{"the destination is the VM's own host", "--to-qmp"},
		},
	}
}

// unsupervised is the refusal of a destination whose userfaultfds are not supervised.
var unsupervised = refusal{
	name:  "unsupervised",
	bring: func(*scene) {},
	mend:  func(*scene) {},
	args:  []string{"--require-secure"},
	words: []string{"--require-secure", "unsupervised"},
}

// TestRefusalsOfHosts checks that check and migrate refuse, in the same words, VMs that cannot be moved because of a
// host. On a machine whose userfaultfds are supervised, --require-secure refuses nothing.
func TestRefusalsOfHosts(t *testing.T) {
	t.Parallel()
	state, _, err := uffd.ProbeSupervision()
	if err != nil {
		testenv.CannotRun(t, "no userfaultfd: %v", err)
	}
	l := newLab(t)
	outer := sceneOf(t, l, lab.VMConfig{}.WithDevices(1, 1))
	refusals := ofHosts(l)
	if state == uffd.Unsupervised {
		refusals = append(refusals, unsupervised)
	} else {
		outer.acceptedByCheck(unsupervised.args)
	}
	for _, c := range refusals {
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

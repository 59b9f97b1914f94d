// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Needed are the capabilities that a daemon keeps of those it has. TestEachCapabilityIsNeeded leaves each out
// and sees what fails.
//
// Not CAP_SYS_ADMIN, with which package inject reads beforehand whether a QEMU's own filter would kill it for
// userfaultfd(2). Without, such a QEMU is killed, at a time when its VM still runs at the source.
var Needed = []cap.Value{
	// Trace a QEMU of another user, read its /proc, take its userfaultfd (ptrace(2), pidfd_getfd(2)); a
	// userfaultfd that sees the faults that the kernel takes, as KVM's are.
	cap.SYS_PTRACE,
	// Open a VM's memory whose file QEMU has closed: /proc/PID/map_files.
	cap.CHECKPOINT_RESTORE,
	// Connect to QMP sockets, and open and empty memory files, of other users.
	cap.DAC_OVERRIDE,
	// Leave the images of a domain, which libvirt ends here, to the VM that uses them elsewhere.
	cap.CHOWN,
	// Know that nobody has the memory file of another user's VM that has left, before it is removed (fcntl(2), F_SETLEASE).
	cap.LEASE,
	// End a QEMU of another user whose VM has left or did not arrive.
	cap.KILL,
}

func needed(c cap.Value) bool { return slices.Contains(Needed, c) }

// dropCapabilities keeps, of what the process has, Needed as permitted and effective, and nothing to inherit.
func dropCapabilities() error {
	had := cap.GetProc()
	// First what exec could bring back. It takes CAP_SETPCAP; a process without it gains nothing all the
	// same, by noNewPrivileges and because the filter lets it start no program.
	if may, err := had.GetFlag(cap.Effective, cap.SETPCAP); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	} else if may {
		if err := dropBound(); err != nil {
			return err
		}
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	kept := cap.NewSet()
	for _, c := range Needed {
		has, err := had.GetFlag(cap.Permitted, c)
		if err != nil {
			return fmt.Errorf("capabilities: %w", err)
		}
		if err := errors.Join(kept.SetFlag(cap.Permitted, has, c), kept.SetFlag(cap.Effective, has, c)); err != nil {
			return fmt.Errorf("capabilities: %w", err)
		}
	}
	if err := kept.SetProc(); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}

func dropBound() error {
	for c := range cap.MaxBits() {
		if needed(c) {
			continue
		}
		if has, err := cap.GetBound(c); err != nil || !has {
			continue // not known to this kernel, or not there
		}
		if err := cap.DropBound(c); err != nil {
			return fmt.Errorf("drop %v from the bounding set: %w", c, err)
		}
	}
	return nil
}

// noNewPrivileges is no_new_privs of all threads (Linux 3.5), without which only CAP_SYS_ADMIN may install a filter.
func noNewPrivileges() error {
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

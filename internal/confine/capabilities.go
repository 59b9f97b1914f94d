// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Needed are the capabilities that the daemon keeps, as far as it has them. TestEachCapabilityIsNeeded drops each
// of them and checks what fails.
//
// CAP_SYS_ADMIN is not among them. With it, package inject could read whether a QEMU's own seccomp filter would kill
// it for calling userfaultfd(2). Without it, such a QEMU is killed; its VM still runs at the source then.
var Needed = []cap.Value{
	// To trace a QEMU of another user, read its /proc and duplicate its userfaultfd (ptrace(2), pidfd_getfd(2)), and
	// for a userfaultfd that also reports faults taken in the kernel, as KVM's are.
	cap.SYS_PTRACE,
	// To open memory of a VM whose file QEMU has closed, by /proc/PID/map_files.
	cap.CHECKPOINT_RESTORE,
	// To connect to the QMP sockets of other users, and to open and empty their memory files.
	cap.DAC_OVERRIDE,
	// To restore the owner of a domain's images when libvirt, ending the domain here, has changed it: the VM uses the
	// images at the other host.
	cap.CHOWN,
	// To check that nobody else has a memory file of another user open before it is removed, once its VM has left
	// (fcntl(2), F_SETLEASE).
	cap.LEASE,
	// To end a QEMU of another user whose VM has left or did not arrive.
	cap.KILL,
}

func needed(c cap.Value) bool { return slices.Contains(Needed, c) }

// dropCapabilities drops all capabilities of the process but Needed, which stay permitted and effective. None stays
// inheritable.
func dropCapabilities() error {
	had := cap.GetProc()
	// The bounding set first, which limits what exec can give back. Changing it needs CAP_SETPCAP. A process without
	// that gains nothing by exec either: it has no_new_privs, and the filter forbids exec.
	if may, err := had.GetFlag(cap.Effective, cap.SETPCAP); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	} else if may {
		if err := dropBoundingSet(); err != nil {
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

// dropBoundingSet drops all but Needed from the bounding set.
func dropBoundingSet() error {
	for c := range cap.MaxBits() {
		if needed(c) {
			continue
		}
		if has, err := cap.GetBound(c); err != nil || !has {
			continue // this kernel does not know it, or it is not in the set
		}
		if err := cap.DropBound(c); err != nil {
			return fmt.Errorf("drop %v from the bounding set: %w", c, err)
		}
	}
	return nil
}

// noNewPrivileges sets no_new_privs for all threads (Linux 3.5). Without it, installing a filter needs CAP_SYS_ADMIN.
func noNewPrivileges() error {
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

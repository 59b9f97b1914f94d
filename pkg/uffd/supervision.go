// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Supervision says how a security module (SELinux) can control a userfaultfd. UFFD.Supervision returns it.
//
// Open makes descriptors with UFFD_SECURE where the kernel has that flag. The flag comes with this project's series
// (kernel/patches) and is in no released Linux. With the flag, forks are not reported. Without FeatureEventFork a
// forked process's copy of the memory is not registered. Where pages are missing, the forked process sees
// zeros. In shared memory all other processes then see these zeros, too, as if they had been installed. Such memory
// must be MADV_DONTFORK, as QEMU's guest RAM is; a forked process then does not have it.
type Supervision uint8

const (
	// Unsupervised: any process that gets the descriptor can use it.
	Unsupervised Supervision = iota

	// Labelled: the descriptor has its own label, and the policy has rules for it (Linux 5.12).
	Labelled

	// Flagged: the descriptor was made with UFFD_SECURE, so no fork makes further descriptors. It has a label, too,
	// where a policy is loaded.
	Flagged
)

var supervisions = [...]string{Unsupervised: "unsupervised", Labelled: "labelled", Flagged: "flag"}

func (s Supervision) String() string {
	if int(s) < len(supervisions) {
		return supervisions[s]
	}
	return fmt.Sprintf("supervision %d", uint8(s))
}

// MarshalText returns String. It fails for a value that is none of the constants.
func (s Supervision) MarshalText() ([]byte, error) {
	if int(s) >= len(supervisions) {
		return nil, fmt.Errorf("there is no %v", s)
	}
	return []byte(s.String()), nil
}

// UnmarshalText sets s from the text that String returns. It fails for any other text.
func (s *Supervision) UnmarshalText(text []byte) error {
	for i, name := range supervisions {
		if name == string(text) {
			*s = Supervision(i)
			return nil
		}
	}
	return fmt.Errorf("%q is none of %q", text, supervisions)
}

// Supervision returns how u is supervised, and its label. The label is empty if there is none.
//
// The kernel does not say whether a descriptor was made with UFFD_SECURE. It is known for descriptors that Open
// or package inject made, and for others after API, from the features that API offers. A descriptor whose handshake
// was made elsewhere (from package handover, or a duplicate of another process's) is at most Labelled.
func (u *UFFD) Supervision() (Supervision, string, error) {
	if !u.acquire() {
		return Unsupervised, "", opLabel.closed
	}
	defer u.release()
	label, err := readLabel(u.fd)
	if !policyHasClass(policyClasses) {
		label = "" // it means nothing
	}
	switch {
	case u.secure.Load():
		return Flagged, label, err
	case label != "":
		return Labelled, label, err
	}
	return Unsupervised, "", err
}

// ProbeSupervision makes a userfaultfd, returns its supervision and label, and closes it.
func ProbeSupervision() (Supervision, string, error) {
	u, err := openAny(OpenOptions{})
	if err != nil {
		return Unsupervised, "", err
	}
	defer u.Close()
	return u.Supervision()
}

var opLabel = newOperation("fgetxattr")

// labelSize is room for any label (SELINUX_LABEL_LENGTH in libselinux).
const labelSize = 4096

// readLabel reads the SELinux label. It is empty on a kernel without SELinux, and on one with SELinux but without
// a policy: nothing has a label until a policy is loaded. Both kernels answer EOPNOTSUPP.
func readLabel(fd int) (string, error) {
	label := make([]byte, labelSize)
	n, err := unix.Fgetxattr(fd, "security.selinux", label)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODATA):
		return "", nil
	case errors.Is(err, unix.EACCES):
		return "", fmt.Errorf("read the label of the userfaultfd: %w: allow this process's domain getattr on its type", err)
	case err != nil:
		return "", fmt.Errorf("read the label of the userfaultfd: %w", err)
	}
	return unix.ByteSliceToString(label[:n]), nil
}

// policyClasses is where selinuxfs shows the object classes of the loaded policy.
const policyClasses = "/sys/fs/selinux/class"

// policyHasClass reports whether the policy has rules for anonymous inodes. A policy without the class permits
// everything, although the kernel labels these inodes all the same. If selinuxfs is not mounted, policyHasClass
// returns true: the label decides alone.
func policyHasClass(classes string) bool {
	if _, err := os.Stat(classes); err != nil {
		return true
	}
	_, err := os.Stat(classes + "/anon_inode")
	return !errors.Is(err, fs.ErrNotExist)
}

// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Supervision says how a security module (SELinux) can watch over a userfaultfd.
type Supervision uint8

const (
	// Unsupervised: nothing stands between a process that gets hold of the descriptor and the memory.
	Unsupervised Supervision = iota

	// Labelled: the descriptor has a label of its own, which the policy has rules for (Linux 5.12).
	Labelled

	// Flagged: it was made with UFFD_SECURE, so that no fork makes further ones. It is labelled too
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

// MarshalText gives String.
func (s Supervision) MarshalText() ([]byte, error) {
	if int(s) >= len(supervisions) {
		return nil, fmt.Errorf("there is no %v", s)
	}
	return []byte(s.String()), nil
}

// UnmarshalText takes what String gives.
func (s *Supervision) UnmarshalText(text []byte) error {
	for i, name := range supervisions {
		if name == string(text) {
			*s = Supervision(i)
			return nil
		}
	}
	return fmt.Errorf("%q is none of %q", text, supervisions)
}

// Supervision says how u is supervised, and its label, which is empty where there is none.
//
// The kernel does not tell of a descriptor whether it was made with UFFD_SECURE. It is known of those
// that Open made or package inject had made, and of others after API, by what that offers. One that comes with
// its handshake made (package handover, a duplicate of another process's) is never more than Labelled.
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

// ProbeSupervision says what a userfaultfd would be that this process makes now, and its label.
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

// readLabel reads the SELinux label. A kernel without SELinux answers that it does not support that, and
// so does one that has SELinux but no policy: until one is loaded nothing has a label.
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

// policyHasClass says whether the policy has rules for anonymous inodes. One that lacks the class lets
// everything pass, although the kernel labels them all the same. Where selinuxfs is not mounted the label must do.
func policyHasClass(classes string) bool {
	if _, err := os.Stat(classes); err != nil {
		return true
	}
	_, err := os.Stat(classes + "/anon_inode")
	return !errors.Is(err, fs.ErrNotExist)
}

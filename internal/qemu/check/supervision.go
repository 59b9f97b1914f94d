// SPDX-License-Identifier: Apache-2.0

package check

import (
	"fmt"
	"os"
	"strings"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

const (
	// Unsupervised is the reason for the state "unsupervised"; it follows that word and a colon.
	Unsupervised = "the kernel has no UFFD_SECURE, and no SELinux policy labels [userfaultfd]"

	// Supervise is the remedy.
	Supervise = "boot a kernel that has UFFD_SECURE (see kernel/README.md) " +
		"or load an SELinux policy that labels [userfaultfd] (see deploy/selinux)"
)

// checkSupervision checks how a userfaultfd of this process is supervised. QEMU's is supervised in the same way, with
// the label of QEMU's own domain. required means that this host refuses to be a destination without supervision.
func checkSupervision(required bool) Result {
	r := Result{Subject: "userfaultfd supervision"}
	state, label, err := uffd.ProbeSupervision()
	switch {
	case err != nil:
		r.Status, r.Detail = Warning, "it cannot be told: "+err.Error()
		r.Remedy = "see what forbids this process a userfaultfd: " +
			"an SELinux domain needs anon_inode { create getattr ioctl } on a type of its own, as deploy/selinux gives it"
	case state == uffd.Unsupervised:
		r.Status, r.Detail, r.Remedy = Warning, fmt.Sprintf("%v: %s", state, Unsupervised), Supervise
	case label == "":
		r.Detail = fmt.Sprintf("%v: made with UFFD_SECURE, without a label", state)
	default:
		r.Detail = fmt.Sprintf("%v: a userfaultfd of this process is labelled %s", state, label)
	}
	switch {
	case required && state == uffd.Unsupervised:
		r.Status = Failed
		r.Detail += "; require_secure is set, so no VM can arrive here"
	case label != "" && permissive():
		r.Status, r.Remedy = Warning,
			"have SELinux enforce the policy: setenforce 1, and SELINUX=enforcing in /etc/selinux/config"
		r.Detail += ", but SELinux is permissive and only logs what it would refuse"
	}
	return r
}

func permissive() bool {
	enforce, err := os.ReadFile("/sys/fs/selinux/enforce")
	return err == nil && strings.TrimSpace(string(enforce)) == "0"
}

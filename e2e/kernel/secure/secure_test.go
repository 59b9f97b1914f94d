// SPDX-License-Identifier: Apache-2.0

// Package secure migrates a KVM VM inside a booted kernel, between two daemons that SELinux confines, and checks what
// they may and may not do. The programs that run in that kernel are in guest, the policy in policy and deploy/selinux.
package secure

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// patience bounds one boot. Nothing waits that long unless it is broken.
const patience = 11 * time.Minute

// Labels of userfaultfds. The VM's QEMU has two categories; a QEMU that a daemon starts has none.
const (
	descriptorLabel = "system_u:object_r:migrated_uffd_t:s0:c1,c2"
	plainLabel      = "system_u:object_r:migrated_uffd_t:s0"
)

// claims are what the guest reports, in its order. A claim has no outcome for a kernel that does not get there.
var claims = []struct {
	name           string
	shows          string
	stock, patched string
}{
	// Without a policy (bare.go).
	{"bare-require", "without a policy only the flag supervises; --require-secure refuses a migration without it",
		"refused", "flag"},
	{"bare-require-arrived", "every page is there when the migration is complete", "", "whole"},
	{"bare-require-guest", "the VM counts on, at the source after a refusal", "counts", "counts"},
	{"bare-require-destination", "a QEMU that was to be arrived in is ended with the refusal", "gone", ""},
	{"bare-require-memory", "its memory is what it wrote", "", "verified"},
	{"bare", "without --require-secure a migration is reported as what it is", "unsupervised", "flag"},
	{"bare-arrived", "every page is there when the migration is complete", "whole", "whole"},
	{"bare-guest", "the VM counts on", "counts", "counts"},
	{"bare-memory", "its memory is what it wrote", "verified", "verified"},
	{"bare-clock", "meanwhile the wall clock was put three years ahead, back, and right, every 5 ms", "jumped", "jumped"},

	// Under the policy, everything with --require-secure (confined.go).
	{"policy", "the policy is loaded and enforced", "enforcing", "enforcing"},
	{"domains", "both daemons run in migrated_t, both QEMUs in svirt_t with the VM's categories", "confined", "confined"},
	{"there-vcpu", "a KVM vCPU sleeps in a page fault that the descriptor is about, while no page comes",
		"waits", "waits"},
	{"there", "the migration completes", "labelled", "flag"},
	{"there-label", "the descriptor's label", descriptorLabel, descriptorLabel},
	{"there-arrived", "every page is there when the migration is complete", "whole", "whole"},
	{"there-guest", "the vCPU goes on", "counts", "counts"},
	{"there-memory", "the memory is what the guest wrote", "verified", "verified"},
	{"there-vms", "the daemon lists the VMs of its host", "listed", "listed"},
	{"there-evacuation", "and writes an evacuation down", "written", "written"},
	{"there-log", "nothing was refused on the way", "clean", "clean"},
	{"there-stranger-create", "a domain that the policy does not name may not create a userfaultfd", "EACCES", "EACCES"},

	// While the destination's QEMU has a descriptor (strangers.go).
	{"sysctl-2", "vm.unprivileged_userfaultfd takes the value that demands the flag", "EINVAL", "ok"},
	{"sysctl-2-way", "with it an unprivileged QEMU needs no device", "/dev/userfaultfd", "userfaultfd(2)"},
	{"stranger-take", "a process that may trace QEMU may not take its descriptor", "EACCES", "EACCES"},
	{"stranger-take-log", "which the kernel logs", "denied", "denied"},
	{"stranger-receive", "nor receive one over a socket: the message arrives without it", "cut-off", "cut-off"},
	{"stranger-receive-log", "which the kernel logs", "denied", "denied"},
	{"qemu-create", "a QEMU may create one", "ok", "ok"},
	{"qemu-ioctl", "but give it no order", "EACCES", "EACCES"},
	{"qemu-read", "and not read it", "EACCES", "EACCES"},
	{"qemu-ioctl-log", "which the kernel logs", "denied", "denied"},
	{"qemu-read-log", "which the kernel logs", "denied", "denied"},
	{"back", "the migration that they tried to disturb completes", "labelled", "flag"},
	{"back-label", "the descriptor's label", descriptorLabel, descriptorLabel},
	{"back-arrived", "every page is there when the migration is complete", "whole", "whole"},
	{"back-guest", "the VM counts on", "counts", "counts"},
	{"back-memory", "its memory is what it wrote", "verified", "verified"},

	// Under policies that forbid what a migration needs.
	{"no-create", "where QEMU may not create one, the migration is refused and says why", "refused", "refused"},
	{"no-create-guest", "the VM counts on at the source", "counts", "counts"},
	{"no-create-destination", "the destination's QEMU is ended", "gone", "gone"},
	{"no-create-log", "the kernel logs what it refused", "denied", "denied"},
	{"no-receive", "where the daemon may not receive one, the migration is refused and says why", "refused", "refused"},
	{"no-receive-guest", "the VM counts on at the source", "counts", "counts"},
	{"no-receive-destination", "the destination's QEMU is ended", "gone", "gone"},
	{"no-receive-log", "the kernel logs what it refused", "denied", "denied"},

	// And under the first policy again, into a QEMU that the daemon starts; another daemon takes its place in between.
	{"again-vcpu", "a KVM vCPU waits, also for a daemon that is killed meanwhile", "waits", "waits"},
	{"again-successor", "the daemon that is started instead takes the descriptor from QEMU once more",
		"took-up", "took-up"},
	{"again", "the migration completes", "labelled", "flag"},
	{"again-label", "the descriptor's label, without categories", plainLabel, plainLabel},
	{"again-arrived", "every page is there when the migration is complete", "whole", "whole"},
	{"again-guest", "the VM counts on", "counts", "counts"},
	{"again-memory", "its memory is what it wrote", "verified", "verified"},
	{"again-log", "nothing was refused on the way", "clean", "clean"},
	{"again-stranger-create", "and others still may not", "EACCES", "EACCES"},

	// A VM whose memory is QEMU's own and in no file, there and back (private.go).
	{"private-vcpu", "a KVM vCPU waits for a page of memory that is in no file", "waits", "waits"},
	{"private", "the migration completes", "labelled", "flag"},
	{"private-label", "the descriptor's label", descriptorLabel, descriptorLabel},
	{"private-arrived", "every page is there when the migration is complete", "whole", "whole"},
	{"private-guest", "the vCPU goes on", "counts", "counts"},
	{"private-memory", "the memory is what the guest wrote", "verified", "verified"},
	{"private-back-vcpu", "and so on the way back, into a QEMU that the daemon starts", "waits", "waits"},
	{"private-back", "the migration completes", "labelled", "flag"},
	{"private-back-label", "the descriptor's label, without categories", plainLabel, plainLabel},
	{"private-back-arrived", "every page is there when the migration is complete", "whole", "whole"},
	{"private-back-guest", "the vCPU goes on", "counts", "counts"},
	{"private-back-memory", "the memory is what the guest wrote", "verified", "verified"},
	{"private-log", "nothing was refused in either direction", "clean", "clean"},
	{"private-stranger-create", "and others still may not create a userfaultfd", "EACCES", "EACCES"},
}

// TestSecureMigration runs in parallel with the other tests that boot a kernel, because a boot keeps one processor
// busy.
func TestSecureMigration(t *testing.T) {
	t.Parallel()
	initrd := rootfs(t, policies(t)...)
	for _, booted := range []struct {
		version kernel.Version
		variant kernel.Variant
	}{{kernel.Linux612, kernel.Stock}, {kernel.Linux612, kernel.Patched}, {kernel.Linux73, kernel.Patched}} {
		t.Run(string(booted.version)+"/"+string(booted.variant), func(t *testing.T) {
			t.Parallel()
			kernel.Only(t, booted.version)
			tree, err := kernel.Build(t.Context(), booted.version, booted.variant)
			if err != nil {
				testenv.CannotRun(t, "%v", err)
			}
			results, err := boot(t, underSELinux(tree, initrd))
			if err != nil {
				t.Error(err)
			}
			for _, c := range claims {
				want := c.stock
				if booted.variant == kernel.Patched {
					want = c.patched
				}
				got, reported := results[c.name]
				delete(results, c.name)
				if want == "" && !reported {
					continue
				}
				t.Run(c.name, func(t *testing.T) {
					if got != want {
						t.Errorf("%s: got %q, want %q", c.shows, got, want)
					}
				})
			}
			if unknown := slices.Sorted(maps.Keys(results)); len(unknown) > 0 {
				t.Errorf("the guest reports %q, of which nothing is known", unknown)
			}
		})
	}
}

// underSELinux returns the options for one of our kernels. With nested page tables the emulator goes astray (README.md,
// "The emulator").
func underSELinux(tree kernel.Tree, initrd string) kernel.Options {
	return kernel.Options{Kernel: tree.BzImage, Initrd: initrd, CommandLine: "lsm=selinux kvm_amd.npt=0"}
}

// boot boots a kernel, gives args to its /init, and returns what the guest reported. The error says that the guest did
// not come to its end.
func boot(t *testing.T, o kernel.Options, args ...string) (map[string]string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	o.MemoryMiB = 1024
	// Notices of the kernel's, refused accesses among them, would come between the guest's lines.
	o.CommandLine = strings.Join(append([]string{o.CommandLine, "loglevel=5 --"}, args...), " ")
	return kernel.Results(ctx, o, func(line string) { t.Log(line) })
}

// SPDX-License-Identifier: Apache-2.0

// Package hugepages shows in booted kernels what khugepaged does to memory that lacks some of its pages.
package hugepages

import (
	"context"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/kernel"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// patience bounds a boot. Nothing waits that long unless it is broken.
const patience = 5 * time.Minute

// Memory that khugepaged fills with zeros after its userfaultfd was closed. It shows that khugepaged does scan
// everything.
var filledUnsupervised = []string{
	"always-memfd-plain", "force-memfd-plain", "never-anonymous-plain", "never-tmpfs-always-plain",
	"never-tmpfs-within_size-plain", "within_size-memfd-plain",
}

// Memory that Linux 6.1 fills as well, although a userfaultfd is registered for missing pages. If the registered
// mapping does not permit that (MADV_NOHUGEPAGE), another mapping of the same file does.
var filledSupervised = []string{
	"advise-memfd-advised", "always-memfd", "always-memfd-advised", "force-memfd", "force-memfd-advised",
	"force-tmpfs-always", "force-tmpfs-never", "never-tmpfs-advise-advised", "never-tmpfs-always",
	"never-tmpfs-always-advised", "never-tmpfs-always-refused-other", "never-tmpfs-within_size",
	"never-tmpfs-within_size-advised", "within_size-memfd", "within_size-memfd-advised",
}

// Memory of which this project's program says that it can have no huge pages.
var notPermitted = []string{
	"deny-memfd", "deny-memfd-advised", "deny-memfd-plain", "deny-tmpfs-always", "deny-tmpfs-never", "never-memfd",
	"never-memfd-advised", "never-memfd-plain", "never-tmpfs-never", "never-tmpfs-never-advised",
	"never-tmpfs-never-plain",
}

// TestMissingPages: Linux 6.1 fills missing pages in spite of a userfaultfd, in all memory except private memory and
// memory where huge pages are not permitted. Linux 6.12 never does. The program distinguishes the two kernels, and the
// memory where it matters.
func TestMissingPages(t *testing.T) {
	for meta, want := range map[string]struct {
		filled []string
		probe  string
	}{
		image.Linux61:  {slices.Sorted(slices.Values(slices.Concat(filledUnsupervised, filledSupervised))), "true"},
		image.Linux612: {filledUnsupervised, "false"},
	} {
		t.Run(meta, func(t *testing.T) {
			got := boot(t, meta)
			var filled, refused []string
			for name, outcome := range got {
				switch words := strings.Fields(outcome); {
				case strings.HasPrefix(name, "probe-"):
					if outcome != want.probe {
						t.Errorf("%s: %s, want %s", name, outcome, want.probe)
					}
				case words[0] == "filled":
					filled = append(filled, name)
				case words[0] != "missing":
					t.Errorf("%s: %s", name, outcome)
				}
				if strings.HasSuffix(outcome, "permitted=false") {
					refused = append(refused, name)
				}
			}
			slices.Sort(filled)
			slices.Sort(refused)
			if diff := cmp.Diff(want.filled, filled); diff != "" {
				t.Errorf("filled with zeros (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(notPermitted, refused); diff != "" {
				t.Errorf("huge pages not permitted (-want +got):\n%s", diff)
			}
			if len(got) != tried {
				t.Errorf("%d results, want %d", len(got), tried)
			}
		})
	}
}

// tried is how many results the guest reports.
const tried = 45

// boot returns what the guest reports in one of Debian's kernels.
func boot(t *testing.T, meta string) map[string]string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	bzImage, err := image.DebianKernel(ctx, meta)
	if err != nil {
		testenv.CannotRun(t, "%v", err)
	}
	initrd, err := kernel.Guest(ctx, t.TempDir(),
		kernel.File{Name: "proc", Mode: fs.ModeDir | 0o555}, kernel.File{Name: "sys", Mode: fs.ModeDir | 0o555})
	if err != nil {
		t.Fatal(err)
	}
	o := kernel.Options{Kernel: bzImage, Initrd: initrd, CommandLine: "loglevel=5 mitigations=off"}
	got, err := kernel.Results(ctx, o, func(line string) { t.Log(line) })
	if err != nil {
		t.Error(err)
	}
	return got
}

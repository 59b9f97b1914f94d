// SPDX-License-Identifier: Apache-2.0

package check

import (
	"os"

	"github.com/migrated-vm/migrated/internal/qemu/hugepages"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

// collapseFillsMissing asks this host's kernel. Tests replace it.
var collapseFillsMissing = uffd.CollapseFillsMissing

// checkHugePages warns if the kernel may hide missing pages of shared memory, and the settings permit that. It does not
// know which memory a VM will use; ram.Memory.Drop refuses the memory that is affected.
func checkHugePages() Result {
	r := Result{Subject: "huge pages", Status: Failed, Remedy: "mount /proc and /sys"}
	fills, err := collapseFillsMissing()
	if err != nil {
		r.Detail = err.Error()
		return r
	}
	if !fills {
		return Result{Subject: r.Subject, Detail: "this kernel's transparent huge pages do not hide missing pages"}
	}
	setting, err := hugepages.Setting()
	if err != nil {
		r.Detail = err.Error()
		return r
	}
	mounts, err := hugepages.Mounts(os.Getpid())
	if err != nil {
		r.Detail = err.Error()
		return r
	}
	return hugePagesResult(setting, mounts)
}

// hugePagesResult returns the result for a kernel that hides missing pages.
func hugePagesResult(setting string, mounts []hugepages.Mount) Result {
	places := []hugepages.Place{{Setting: setting}}
	if setting != hugepages.Force { // "force" overrides the mounts
		for i := range mounts {
			places = append(places, hugepages.Place{Setting: setting, Mount: &mounts[i]})
		}
	}
	for _, h := range places {
		if h.Permitted() {
			return Result{
				Subject: "huge pages", Status: Warning, Remedy: h.Remedy(),
				Detail: h.Because() + ", and this kernel may fill missing pages with zeros " +
					"when it makes a transparent huge page: " +
					"as a destination, this host refuses a VM with its memory there",
			}
		}
	}
	return Result{
		Subject: "huge pages",
		Detail:  "no tmpfs allows transparent huge pages (this kernel would fill missing pages with zeros)",
	}
}

// SPDX-License-Identifier: Apache-2.0

package testenv

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// pool returns the file with the number of huge pages of size bytes that the machine has.
func pool(size uint64) string {
	return fmt.Sprintf("/sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages", size>>10)
}

// HugePages returns how many huge pages of size bytes the machine has, in use or not.
func HugePages(size uint64) (int, error) {
	text, err := os.ReadFile(pool(size))
	if err != nil {
		return 0, fmt.Errorf("huge pages of %d KiB: %w", size>>10, err)
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// SetHugePages gives the machine n huge pages of size bytes, and returns how many it has then: fewer, where memory is
// short or in pieces.
//
// One write is not enough. Linux ends its search without an error when the thread has a signal pending (mm/hugetlb.c,
// set_max_huge_pages), and Go's runtime sends its threads signals.
func SetHugePages(size uint64, n int) (int, error) {
	const attempts = 4 // in a row that changed nothing
	now, err := HugePages(size)
	for failed := 0; err == nil && now != n && failed < attempts; {
		if err := os.WriteFile(pool(size), []byte(strconv.Itoa(n)), 0o644); err != nil {
			return now, fmt.Errorf("reserve huge pages: %w", err)
		}
		before := now
		if now, err = HugePages(size); now == before {
			failed++
		}
	}
	return now, err
}

// pools is held while the number of huge pages is changed: tests of a process may run at the same time.
var pools sync.Mutex

// addHugePages adds n huge pages of size bytes to those that the machine has, or takes -n away, and returns how many
// were added.
func addHugePages(size uint64, n int) (added int, err error) {
	pools.Lock()
	defer pools.Unlock()
	before, err := HugePages(size)
	if err != nil {
		return 0, err
	}
	now, err := SetHugePages(size, max(0, before+n))
	return now - before, err
}

// ReserveHugePages adds n huge pages of size bytes to those that the machine has, until the test ends. Other tests of
// this process may do the same meanwhile: each takes away only what it has added.
func ReserveHugePages(t testing.TB, size uint64, n int) {
	t.Helper()
	if _, err := HugePages(size); err != nil {
		CannotRun(t, "%v", err)
	}
	added, err := addHugePages(size, n)
	t.Cleanup(func() {
		if _, err := addHugePages(size, -added); err != nil {
			t.Errorf("give the huge pages back: %v", err)
		}
	})
	if err != nil || added < n {
		CannotRun(t, "the kernel gave %d of %d huge pages of %d KiB (%v)", added, n, size>>10, err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package uffd

import (
	"fmt"
	"strings"

	"github.com/migrated-vm/migrated/pkg/uffd/internal/abi"
)

// Features is a set of UFFD_FEATURE_* bits.
type Features uint64

// What a userfaultfd can be asked for in the API handshake. The EVENT features make more kinds of messages
// readable and must be enabled to have an effect; so must THREAD_ID, SIGBUS, EXACT_ADDRESS, the WP ones.
// The MISSING and MINOR ones, POISON and MOVE only state what the kernel has.
const (
	FeatureWP               Features = abi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
	FeatureEventFork        Features = abi.UFFD_FEATURE_EVENT_FORK // needs CAP_SYS_PTRACE
	FeatureEventRemap       Features = abi.UFFD_FEATURE_EVENT_REMAP
	FeatureEventRemove      Features = abi.UFFD_FEATURE_EVENT_REMOVE
	FeatureEventUnmap       Features = abi.UFFD_FEATURE_EVENT_UNMAP
	FeatureMissingHugetlbfs Features = abi.UFFD_FEATURE_MISSING_HUGETLBFS
	FeatureMissingShmem     Features = abi.UFFD_FEATURE_MISSING_SHMEM
	FeatureSigbus           Features = abi.UFFD_FEATURE_SIGBUS
	FeatureThreadID         Features = abi.UFFD_FEATURE_THREAD_ID
	FeatureMinorHugetlbfs   Features = abi.UFFD_FEATURE_MINOR_HUGETLBFS
	FeatureMinorShmem       Features = abi.UFFD_FEATURE_MINOR_SHMEM
	FeatureExactAddress     Features = abi.UFFD_FEATURE_EXACT_ADDRESS
	FeatureWPHugetlbfsShmem Features = abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
	FeatureWPUnpopulated    Features = abi.UFFD_FEATURE_WP_UNPOPULATED
	FeaturePoison           Features = abi.UFFD_FEATURE_POISON
	FeatureWPAsync          Features = abi.UFFD_FEATURE_WP_ASYNC
	FeatureMove             Features = abi.UFFD_FEATURE_MOVE
)

// featureTable has the features in the order of their bits, each with the first kernel that has it
// (ioctl_userfaultfd(2)); an architecture may have it later.
var featureTable = []struct {
	bit       Features
	name      string
	minKernel kernelVersion
}{
	{FeatureWP, "UFFD_FEATURE_PAGEFAULT_FLAG_WP", kernelVersion{5, 7}},
	{FeatureEventFork, "UFFD_FEATURE_EVENT_FORK", kernelVersion{4, 11}},
	{FeatureEventRemap, "UFFD_FEATURE_EVENT_REMAP", kernelVersion{4, 11}},
	{FeatureEventRemove, "UFFD_FEATURE_EVENT_REMOVE", kernelVersion{4, 11}},
	{FeatureMissingHugetlbfs, "UFFD_FEATURE_MISSING_HUGETLBFS", kernelVersion{4, 11}},
	{FeatureMissingShmem, "UFFD_FEATURE_MISSING_SHMEM", kernelVersion{4, 11}},
	{FeatureEventUnmap, "UFFD_FEATURE_EVENT_UNMAP", kernelVersion{4, 11}},
	{FeatureSigbus, "UFFD_FEATURE_SIGBUS", kernelVersion{4, 14}},
	{FeatureThreadID, "UFFD_FEATURE_THREAD_ID", kernelVersion{4, 14}},
	{FeatureMinorHugetlbfs, "UFFD_FEATURE_MINOR_HUGETLBFS", kernelVersion{5, 13}},
	{FeatureMinorShmem, "UFFD_FEATURE_MINOR_SHMEM", kernelVersion{5, 14}},
	{FeatureExactAddress, "UFFD_FEATURE_EXACT_ADDRESS", kernelVersion{5, 18}},
	{FeatureWPHugetlbfsShmem, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM", kernelVersion{5, 19}},
	{FeatureWPUnpopulated, "UFFD_FEATURE_WP_UNPOPULATED", kernelVersion{6, 4}},
	{FeaturePoison, "UFFD_FEATURE_POISON", kernelVersion{6, 6}},
	{FeatureWPAsync, "UFFD_FEATURE_WP_ASYNC", kernelVersion{6, 7}},
	{FeatureMove, "UFFD_FEATURE_MOVE", kernelVersion{6, 8}},
}

// String lists the names, joined by "|".
func (f Features) String() string {
	if f == 0 {
		return "none"
	}
	var names []string
	for _, e := range featureTable {
		if f&e.bit != 0 {
			names = append(names, e.name)
			f &^= e.bit
		}
	}
	if f != 0 {
		names = append(names, fmt.Sprintf("%#x", uint64(f)))
	}
	return strings.Join(names, "|")
}

// kernelVersion is the release that brought something: 6.12 is {6, 12}.
type kernelVersion struct{ major, minor int }

func (v kernelVersion) String() string { return fmt.Sprintf("%d.%d", v.major, v.minor) }

func (v kernelVersion) less(w kernelVersion) bool {
	return v.major < w.major || v.major == w.major && v.minor < w.minor
}

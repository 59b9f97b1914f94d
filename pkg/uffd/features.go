// SPDX-License-Identifier: Apache-2.0

package uffd

import "github.com/migrated-vm/migrated/pkg/uffd/internal/abi"

// Features is a set of UFFD_FEATURE_* bits.
type Features uint64

// The features that the API handshake can ask for. The EVENT features make more kinds of messages readable.
// EVENT, THREAD_ID, SIGBUS, EXACT_ADDRESS, WP and RWP features have an effect only when they are enabled.
// MISSING and MINOR features, POISON and MOVE only state what the kernel has.
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
	FeatureRWP              Features = abi.UFFD_FEATURE_RWP
	FeatureRWPAsync         Features = abi.UFFD_FEATURE_RWP_ASYNC // only together with FeatureRWP
)

// featureTable lists the features in the order of their bits, each with the first kernel that has it
// (ioctl_userfaultfd(2)). An architecture may have got it later.
var featureTable = capabilities[Features]{
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
	{FeatureRWP, "UFFD_FEATURE_RWP", kernelVersion{7, 3}},
	{FeatureRWPAsync, "UFFD_FEATURE_RWP_ASYNC", kernelVersion{7, 3}},
}

// String lists the names, joined by "|".
func (f Features) String() string { return featureTable.names(f) }

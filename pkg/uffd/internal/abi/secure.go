// SPDX-License-Identifier: Apache-2.0

package abi

// UFFD_SECURE is a flag of userfaultfd(2) and USERFAULTFD_IOC_NEW. It comes with this project's own series
// (kernel/patches), which takes the value after UFFD_USER_MODE_ONLY. No released Linux has it: other
// kernels refuse it with EINVAL, as every unknown flag.
const UFFD_SECURE = 0x2

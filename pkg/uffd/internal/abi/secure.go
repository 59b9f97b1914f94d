// SPDX-License-Identifier: Apache-2.0

package abi

// UFFD_SECURE is a flag of userfaultfd(2) and USERFAULTFD_IOC_NEW that no released Linux has: other
// kernels refuse it with EINVAL, as they do every flag they do not know. It comes with this
// project's own series (kernel/patches), which takes the value after UFFD_USER_MODE_ONLY.
const UFFD_SECURE = 0x2

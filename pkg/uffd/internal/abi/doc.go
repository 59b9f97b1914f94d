// SPDX-License-Identifier: Apache-2.0

// Package abi is include/uapi/linux/userfaultfd.h in Go, and the part of include/uapi/linux/fs.h about PAGEMAP_SCAN:
// names, values and layouts, nothing else.
// The headers are in pkg/uffd/abi. A test has a C compiler check this package against them.
// The names are the kernel's, so that they can be searched for. A leading underscore
// (_UFFDIO_COPY, the number inside the ioctl UFFDIO_COPY) becomes Nr_.
package abi

//go:generate -command genabi go run ../genabi -package abi
//go:generate genabi -in ../../abi/userfaultfd.h -out zabi_linux.go
//go:generate genabi -in ../../abi/fs.h -from PROCFS_IOCTL_MAGIC -until /proc/<pid>/maps -out zpagemap_linux.go

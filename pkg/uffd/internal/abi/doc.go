// SPDX-License-Identifier: Apache-2.0

// Package abi is include/uapi/linux/userfaultfd.h in Go: names, values and layouts, nothing else.
// The header is kept in pkg/uffd/abi; a test compares this package with what a C compiler makes of it.
// The kernel's names are kept so that they can be searched for; where one begins with an underscore
// (_UFFDIO_COPY, the number inside the ioctl UFFDIO_COPY) that becomes Nr_.
package abi

//go:generate go run ../genabi -in ../../abi/userfaultfd.h -out zabi_linux.go -package abi

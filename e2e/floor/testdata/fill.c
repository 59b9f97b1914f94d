/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fill KIND MIB
 *
 * fills fresh shared memory in pieces of 512 KiB, all from the same buffer, on one thread:
 *
 *	memcpy  by writing to it
 *	uffd    by UFFDIO_COPY
 */
#define _GNU_SOURCE
#include "bench.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PIECE (512ul << 10)

int main(int argc, char **argv)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_copy copy = { .len = PIECE };
	struct uffdio_register r = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	size_t bytes;
	char *memory, *piece = aligned_alloc(4096, PIECE);
	int fd, u = -1;
	int64_t begun;

	if (argc != 3 || !piece)
		return 2;
	bytes = strtoul(argv[2], NULL, 0) << 20;
	memset(piece, 1, PIECE);
	fd = memfd_create("floor", MFD_CLOEXEC);
	must("memfd_create", fd);
	must("ftruncate", ftruncate(fd, (off_t)bytes));
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must("mmap", memory == MAP_FAILED ? -1 : 0);
	if (!strcmp(argv[1], "uffd")) {
		u = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
		must("userfaultfd", u);
		must("UFFDIO_API", ioctl(u, UFFDIO_API, &api));
		r.range.start = (uintptr_t)memory;
		r.range.len = bytes;
		must("UFFDIO_REGISTER", ioctl(u, UFFDIO_REGISTER, &r));
	}
	begun = now();
	for (size_t at = 0; at < bytes; at += PIECE) {
		if (u < 0) {
			memcpy(memory + at, piece, PIECE);
			continue;
		}
		copy.dst = (uintptr_t)memory + at;
		copy.src = (uintptr_t)piece;
		copy.copy = 0;
		must("UFFDIO_COPY", ioctl(u, UFFDIO_COPY, &copy));
	}
	report(NULL, 0, bytes, now() - begun);
	return 0;
}

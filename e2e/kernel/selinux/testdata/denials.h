// SPDX-License-Identifier: Apache-2.0

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

// log_denials prints the refused accesses that the kernel has logged. It prints them at the end, because on the
// console they would come between other lines.
static void log_denials(void)
{
	static char record[8192];
	ssize_t n;
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	while ((n = read(fd, record, sizeof(record) - 1)) > 0) { // each read returns one record
		record[n] = 0;
		char *text = strstr(record, "avc:  denied");
		if (text)
			printf("LOG %.*s\n", (int)strcspn(text, "\n"), text);
	}
	close(fd);
}

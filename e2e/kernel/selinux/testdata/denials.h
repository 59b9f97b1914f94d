// SPDX-License-Identifier: Apache-2.0

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

// log_denials prints what the kernel noted of refused accesses. It does so itself only at the end and not on
// the console as they come, where they would come in between other lines.
static void log_denials(void)
{
	static char record[8192];
	ssize_t n;
	int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);

	while ((n = read(fd, record, sizeof(record) - 1)) > 0) { // one record each
		record[n] = 0;
		char *text = strstr(record, "avc:  denied");
		if (text)
			printf("LOG %.*s\n", (int)strcspn(text, "\n"), text);
	}
	close(fd);
}

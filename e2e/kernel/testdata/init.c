// SPDX-License-Identifier: Apache-2.0
/*
 * The first process of a guest that only shows that it boots. Its argument, after '--' on the kernel's
 * command line, is how it ends: "off", "crash", "reset" or "hang".
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

static void crash(void)
{
	int fd;

	if (mkdir("/proc", 0755) || mount("proc", "/proc", "proc", 0, NULL))
		perror("/proc");
	fd = open("/proc/sysrq-trigger", O_WRONLY);
	if (fd < 0 || write(fd, "c", 1) != 1)
		perror("/proc/sysrq-trigger");
}

int main(int argc, char **argv)
{
	const char *end = argc > 1 ? argv[1] : "off";
	struct utsname u;

	uname(&u);
	printf("hello from %s\n", u.release);
	fflush(stdout);
	if (!strcmp(end, "crash"))
		crash();
	while (!strcmp(end, "hang"))
		pause();
	sync();
	if (!strcmp(end, "reset"))
		reboot(RB_AUTOBOOT);
	reboot(RB_POWER_OFF);
	return 1;
}

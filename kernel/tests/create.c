// SPDX-License-Identifier: GPL-2.0
/* Who may create a userfaultfd, and what it is labelled. */
#include "harness.h"

struct who {
	const char *domain;
	bool device;
};

static int create(const struct who *w)
{
	int dev = MUST(open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));

	enter(w->domain);
	return w->device ? new_uffd_dev(dev, O_CLOEXEC | O_NONBLOCK) :
			   new_uffd(O_CLOEXEC | O_NONBLOCK);
}

static void allowed(const void *arg)
{
	outcome("%s", made(create(arg) < 0 ? errno : 0));
}

/* The record names the class of the inode, which an auditor looks for. */
static void refused(const void *arg)
{
	int log = open_log();

	if (create(arg) >= 0)
		outcome("fd");
	if (errno != EACCES)
		outcome("%s", name(errno));
	outcome("EACCES-%s", denied(log, "create", "barred_t", "barred_uffd_t") ?
				     "create" : "unlogged");
}

static void labelled(const void *arg)
{
	outcome("%s", type_of(MUST(create(arg))));
}

/* Permissive: created, and logged all the same. */
static void permissive(const void *arg)
{
	int log = open_log();
	int fd;

	put("/sys/fs/selinux/enforce", "0");
	fd = create(arg);
	put("/sys/fs/selinux/enforce", "1");
	MUST(fd);
	outcome("fd-%s", denied(log, "create", "barred_t", "barred_uffd_t") ?
				 "create" : "unlogged");
}

#define WHO(...) &(const struct who){ __VA_ARGS__ }

const struct test create_tests[] = {
	{ "create-allowed", allowed, WHO("app_t") },
	{ "create-allowed-device", allowed, WHO("app_t", .device = true) },
	{ "create-denied", refused, WHO("barred_t") },
	{ "create-denied-device", refused, WHO("barred_t", .device = true) },
	{ "create-denied-fork-child", allowed, WHO("child_t") },
	{ "create-permissive", permissive, WHO("barred_t") },
	{ "create-label-by-name", labelled, WHO("app_t") },
	{ "create-label-by-name-device", labelled, WHO("app_t", .device = true) },
	{ "create-label-default", labelled, WHO("plain_t") },
	{}
};

// SPDX-License-Identifier: GPL-2.0
/*
 * vm.unprivileged_userfaultfd. The outcome is what became of a plain, a
 * user-mode-only and a secure descriptor; of the value, where it is refused.
 */
#include "harness.h"

#include <sched.h>

#define SYSCTL "/proc/sys/vm/unprivileged_userfaultfd"

struct setting {
	const char *value;
	enum { PRIVILEGED, UNPRIVILEGED, NAMESPACE_ROOT } who;
	bool device;
};

static const int kinds[] = { 0, UFFD_USER_MODE_ONLY, UFFD_SECURE };

static void tried(const void *arg)
{
	const struct setting *s = arg;
	int dev = MUST(open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
	int error = try_put(SYSCTL, s->value);
	const char *got[3];

	if (error)
		outcome("%s", name(error));
	enter("app_t");
	if (s->who != PRIVILEGED)
		drop_privileges();
	if (s->who == NAMESPACE_ROOT)
		MUST(unshare(CLONE_NEWUSER));
	for (int i = 0; i < 3; i++) {
		int fd = s->device ? new_uffd_dev(dev, kinds[i]) :
				     new_uffd(kinds[i]);

		got[i] = made(fd < 0 ? errno : 0);
	}
	outcome("%s/%s/%s", got[0], got[1], got[2]);
}

static void refused(const void *arg)
{
	outcome("%s", made(try_put(SYSCTL, arg)));
}

static void both_flags(const void *arg)
{
	int error = try_put(SYSCTL, "2");

	if (error)
		outcome("%s", name(error));
	drop_privileges();
	error = new_uffd(UFFD_SECURE | UFFD_USER_MODE_ONLY) < 0 ? errno : 0;
	outcome("%s", made(error));
}

/* A read gives what was written, so that tools may save and restore it. */
static void kept(const void *arg)
{
	int error = try_put(SYSCTL, "2");

	if (error)
		outcome("%s", name(error));
	outcome("%ld", get(SYSCTL));
}

#define SET(...) &(const struct setting){ __VA_ARGS__ }
#define VALUE(v)                                                               \
	{ "sysctl-" v "-privileged-syscall", tried, SET(v, PRIVILEGED) },      \
	{ "sysctl-" v "-privileged-device", tried, SET(v, PRIVILEGED, true) }, \
	{ "sysctl-" v "-unprivileged-syscall", tried, SET(v, UNPRIVILEGED) },  \
	{ "sysctl-" v "-unprivileged-device", tried, SET(v, UNPRIVILEGED, true) }

const struct test sysctl_tests[] = {
	VALUE("0"),
	VALUE("1"),
	VALUE("2"),
	{ "sysctl-2-namespace-root", tried, SET("2", NAMESPACE_ROOT) },
	{ "sysctl-2-both-flags", both_flags },
	{ "sysctl-2-kept", kept },
	{ "sysctl-3", refused, "3" },
	{ "sysctl-negative", refused, "-1" },
	{}
};

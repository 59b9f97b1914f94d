/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The cast of a fork event. The test is the reader. A forker is started, which
 * in app_t makes userfaultfds that want fork events, one for each page of the
 * stage, sends them to the reader, closes its own, moves to child_t and forks
 * when told to; its child is in child_t too.
 */
#ifndef SCENE_H
#define SCENE_H

#include "harness.h"

struct scene {
	/* Chosen by the test. */
	int descriptors;
	int flags;	   /* of the userfaultfds */
	bool unprivileged; /* the forker, once it has its descriptors */
	bool abandoned;	   /* the child leaves at once and is reaped */
	bool rwp;	   /* the pages hold RWP_DATA and are protected */

	char *stage;	   /* the pages, one for a descriptor */
	int uffd[2];	   /* the reader's */
	pid_t forker;
	int orders[2];	   /* to the forker, see enum order */
	int forked[2];	   /* from it: the errno of its fork, or 0 */
	int seen[2];	   /* from it: the byte that it saw on its stage, or
			    * whether an allocation was made to fail */
	int child_seen[2]; /* from its child: likewise, page by page */
	int sock[2];
};

#define RWP_DATA 'r'

enum order {
	FORK,
	FORK_TWICE,   /* by two threads at once */
	FORK_FOREVER,
	FORK_WAITING, /* on, until the child executes or exits, as vfork() */
	LOOK,	      /* at the first page of the stage */
	FAIL,	      /* FAIL + n: fork, the n-th allocation fails */
};

/* Starts the forker and moves the caller to the reader's domain. */
void begin(struct scene *s, const char *reader);

/* Closes what the caller had of it; the descriptors are the caller's. */
void end_scene(struct scene *s);

/* Waits for a fork event and reads it. */
int read_fork(int uffd, int *child); /* errno, or 0 and a descriptor */

/* Tells the forker to fork. */
void order(struct scene *s, enum order what);

/* What fork gave: errno or 0. */
int fork_result(struct scene *s);

/* Whether the forker waits in the kernel and nothing moves it. */
bool stuck(struct scene *s);

/* Serves the child's faults through its descriptors and checks what it sees. */
void serve_child(struct scene *s, const int *child);

#endif

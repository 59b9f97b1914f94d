// SPDX-License-Identifier: Apache-2.0

//go:build chaos

package migration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// pointDir has, for each point that something is to happen at, a file of the
// point's name that says what.
const pointDir = "/run/chaos"

// heldLongest bounds how long a point is held whose file nobody removes.
const heldLongest = time.Minute

// reached does what the point's file says, once: the file is renamed first, to
// the name with ".reached" at its end, and is then the sign that it was read.
//
//	kill    this daemon kills itself
//	panic   it ends as by a mistake in its program
//	freeze  it stops itself, as by SIGSTOP
//	hold    the caller waits until the renamed file is removed
func reached(point string) {
	path := filepath.Join(pointDir, point)
	order, err := os.ReadFile(path)
	if err != nil {
		return // nothing is to happen here
	}
	held := path + ".reached"
	if os.Rename(path, held) != nil {
		return // somebody else was here first
	}
	switch strings.TrimSpace(string(order)) {
	case "kill":
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
		select {} // it ends
	case "panic":
		panic("told to at " + point)
	case "freeze":
		_ = syscall.Kill(syscall.Getpid(), syscall.SIGSTOP)
	case "hold":
		for end := time.Now().Add(heldLongest); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if _, err := os.Lstat(held); err != nil {
				return
			}
		}
	}
}

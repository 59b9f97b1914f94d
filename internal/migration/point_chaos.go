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

// pointDir holds the orders of a test: a file with the name of a point says what happens there.
const pointDir = "/run/chaos"

// heldLongest bounds how long hold waits if nobody removes the file.
const heldLongest = time.Minute

// testPoint does once what the point's file says. It first renames the file to a
// name that ends in ".reached", which shows that the order was read.
//
//	kill    this daemon kills itself
//	panic   it panics, as by a bug
//	freeze  it stops itself by SIGSTOP
//	hold    the caller waits until the renamed file is removed
func testPoint(point string) {
	path := filepath.Join(pointDir, point)
	order, err := os.ReadFile(path)
	if err != nil {
		return // there is no order
	}
	held := path + ".reached"
	if os.Rename(path, held) != nil {
		return // another goroutine took the order
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

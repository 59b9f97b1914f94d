// SPDX-License-Identifier: Apache-2.0

package ram

import (
	"os"
	"testing"
)

func TestMapsFile(t *testing.T) {
	const key = " 00:1b 15 "
	for line, want := range map[string]bool{
		"7f00-7f10 rw-s 00000000 00:1b 15                         /dev/shm/ram\n":         true,
		"7f00-7f10 rw-s 00000000 00:1b 155                        /dev/shm/ram\n":         false,
		"7f00-7f10 rw-s 00000000 00:1c 15                         /dev/shm/ram\n":         false,
		"7f00-7f10 rw-s 00000000 00:1c 16                         /dev/shm/ 00:1b 15 a\n": false,
		"7f00-7f10 r--p 00:1b 15 \n": false,
		"":                           false,
		"7f00-7f10 rw-p 00000000 00:00 0 \n7f20-7f30 r--p 00002000 00:1b 15     a b\n": true,
	} {
		if got := mapsFile([]byte(line), []byte(key)); got != want {
			t.Errorf("%q: %t", line, got)
		}
	}
}

func TestSharesMemory(t *testing.T) {
	if !sharesMemory(os.Getpid(), os.Getpid()) {
		t.Error("a process has not its own memory")
	}
	if sharesMemory(os.Getpid(), os.Getppid()) {
		t.Error("a process has another's memory")
	}
}

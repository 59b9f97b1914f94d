// SPDX-License-Identifier: Apache-2.0

package process

import (
	"testing"
)

func TestParseMapping(t *testing.T) {
	for line, want := range map[string]Mapping{
		"7f78f7fff000-7f78fbfff000 rw-s 00001000 00:1b 15                         /dev/shm/a b (deleted)": {
			Start: 0x7f78f7fff000, End: 0x7f78fbfff000, Writable: true, Shared: true, Offset: 0x1000,
			Minor: 0x1b, Inode: 15, Path: "/dev/shm/a b (deleted)",
		},
		"1000-2000 r-xp 00000000 fd:01 77 /bin/x": {
			Start: 0x1000, End: 0x2000, Major: 0xfd, Minor: 1, Inode: 77, Path: "/bin/x",
		},
		"1000-2000 rw-p 00000000 00:00 0 ": {Start: 0x1000, End: 0x2000, Writable: true},
	} {
		if got, err := parseMapping(line); err != nil || got != want {
			t.Errorf("%q: %+v, %v", line, got, err)
		}
	}
	if _, err := parseMapping("1000-2000 rw-p"); err == nil {
		t.Error("half a line is accepted")
	}
}

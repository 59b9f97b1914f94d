// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// TestMovedPaths: two machines with disks, firmware and network cards have nothing in common on a host.
func TestMovedPaths(t *testing.T) {
	used := map[string]string{}
	for number, name := range []string{"one", "two"} {
		c := lab.RealVM("kernel", "initrd", 256, 2, 2)
		c.UEFI, c.Backend, c.Number = true, lab.BackendFile, number
		for _, arg := range c.Args() {
			for part := range strings.SplitSeq(moved(name, arg), ",") {
				key, value, _ := strings.Cut(part, "=")
				switch key {
				case "file.filename":
					if strings.HasPrefix(value, "/usr/") {
						continue // the firmware's code, which is only read
					}
				case "path", "mem-path", "ifname", "mac":
				default:
					continue
				}
				if other, ok := used[value]; ok && other != name {
					t.Errorf("%s is of %s and of %s", part, other, name)
				}
				used[value] = name
			}
		}
	}
	if len(used) < 2*8 {
		t.Errorf("only these were looked at: %v", used)
	}
}

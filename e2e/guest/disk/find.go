// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// find returns the device of the disk with that serial number. The driver has made all devices when its module has been
// loaded.
func find(serial string) (string, error) {
	paths, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return "", err
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(text)) == serial {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(path))), nil
		}
	}
	return "", fmt.Errorf("no disk has the serial number %s, of %d that have one: is there such a virtio-blk-pci, "+
		"and its driver in the initramfs?", serial, len(paths))
}

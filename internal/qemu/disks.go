// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu/launch"
)

// Disk is one image file that the VM has open; backing files count.
type Disk struct {
	Device string // QEMU's name of the drive; may be empty
	File   string // as QEMU names it: a path, or "nbd://..."
	Local  bool   // another host probably does not have this file or device
}

// image holds the used fields of ImageInfo (qapi/block-core.json).
type image struct {
	Filename string `json:"filename"`
	Backing  *image `json:"backing-image"`
}

// Disks returns the images of all drives that have a medium, each followed by its backing images.
func (vm *VM) Disks(ctx context.Context) ([]Disk, error) {
	var drives []struct {
		Device   string `json:"device"`
		Inserted *struct {
			Image image `json:"image"`
		} `json:"inserted"`
	}
	if err := vm.QMP.Do(ctx, "query-block", nil, &drives); err != nil {
		return nil, err
	}
	var disks []Disk
	for _, d := range drives {
		if d.Inserted == nil {
			continue
		}
		for i := &d.Inserted.Image; i != nil; i = i.Backing {
			disks = append(disks, Disk{Device: d.Device, File: i.Filename, Local: vm.isLocal(i.Filename)})
		}
	}
	return disks, nil
}

// protocol matches a prefix such as "nbd:" or "rbd:". It follows path_has_protocol in QEMU's block.c: the colon comes
// before the first slash.
var protocol = regexp.MustCompile(`^[^/:]+:`)

func (vm *VM) isLocal(file string) bool {
	file = strings.TrimPrefix(file, "file:")
	if strings.HasPrefix(file, "json:") {
		return strings.Contains(file, `"driver": "file"`) || strings.Contains(file, `"driver": "host_device"`)
	}
	if file == "" || HasProtocol(file) {
		return false
	}
	// QEMU may be in another mount namespace than this process.
	path := fmt.Sprintf("/proc/%d/root%s", vm.Pid, file)
	if !filepath.IsAbs(file) {
		path = fmt.Sprintf("/proc/%d/cwd/%s", vm.Pid, file)
	}
	shared, err := launch.IsShared(path)
	return err != nil || !shared
}

// HasProtocol reports whether an image name begins with a protocol; it is not a path then.
func HasProtocol(name string) bool { return protocol.MatchString(name) }

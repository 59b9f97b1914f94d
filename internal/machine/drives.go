// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/qom"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// image has the members of ImageInfo (qapi/block-core.json) that are used.
type image struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
	Size     uint64 `json:"virtual-size"`
	Backing  *image `json:"backing-image"`
}

// throttleLimits are the members of BlockDeviceInfo (qapi/block-core.json) that limit a drive. One of zero is none.
var throttleLimits = []string{
	"bps", "bps_rd", "bps_wr", "bps_max", "bps_rd_max", "bps_wr_max",
	"bps_max_length", "bps_rd_max_length", "bps_wr_max_length",
	"iops", "iops_rd", "iops_wr", "iops_max", "iops_rd_max", "iops_wr_max",
	"iops_max_length", "iops_rd_max_length", "iops_wr_max_length", "iops_size",
}

// throttlingOf lists the limits of a drive, by the members of its BlockDeviceInfo, and the group that shares them.
func throttlingOf(inserted json.RawMessage) (string, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(inserted, &members); err != nil {
		return "", err
	}
	var parts []string
	for _, name := range throttleLimits {
		if value := string(members[name]); value != "" && value != "0" {
			parts = append(parts, name+" "+value)
		}
	}
	if len(parts) > 0 && members["group"] != nil {
		var group string
		if err := json.Unmarshal(members["group"], &group); err != nil {
			return "", err
		}
		parts = append(parts, "group "+group)
	}
	return strings.Join(parts, ", "), nil
}

// describeDrives fills in d.Drives: the drives of all devices, and those without a device.
func describeDrives(
	ctx context.Context, vm *qemu.VM, d *migratedv1.MachineDescription, anonymous map[string]string,
) error {
	var drives []struct {
		Name     string          `json:"device"` // may be empty
		Device   string          `json:"qdev"`   // its id, or a path; may be empty
		Inserted json.RawMessage `json:"inserted"`
	}
	if err := vm.QMP.Do(ctx, "query-block", nil, &drives); err != nil {
		return err
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", vm.Pid))
	if err != nil {
		return fmt.Errorf("working directory of QEMU: %w", err)
	}
	for _, drive := range drives {
		described := &migratedv1.Drive{
			Name: driveName(drive.Name, drive.Device, anonymous), Throttling: proto.String(""),
		}
		if drive.Inserted != nil {
			var inserted struct {
				ReadOnly bool  `json:"ro"`
				Image    image `json:"image"`
			}
			limits, err := throttlingOf(drive.Inserted)
			if err := errors.Join(err, json.Unmarshal(drive.Inserted, &inserted)); err != nil {
				return fmt.Errorf("QEMU's answer to query-block: %w", err)
			}
			described.ReadOnly, described.Throttling = inserted.ReadOnly, &limits
			for i := &inserted.Image; i != nil; i = i.Backing {
				file := fileName(i.Filename, dir)
				described.Images = append(described.Images, &migratedv1.Image{File: file, Format: i.Format, Size: i.Size})
			}
			if top := described.GetImages()[0]; isTemporary(vm, top.GetFile()) {
				top.Temporary = true
				if top.Written, err = written(ctx, vm, drive.Name, drive.Device); err != nil {
					return err
				}
			}
		}
		d.Drives = append(d.Drives, described)
	}
	slices.SortFunc(d.Drives, func(a, b *migratedv1.Drive) int { return strings.Compare(a.GetName(), b.GetName()) })
	return nil
}

// driveName returns a name for a drive that is the same on both hosts: that of its device, if it has one. It is not the
// path of a built-in device, whose number differs between versions of QEMU.
func driveName(name, device string, anonymous map[string]string) string {
	path, _ := strings.CutSuffix(device, "/virtio-backend")
	if name, found := anonymous[path]; found {
		return name
	}
	if strings.HasPrefix(path, builtIn) && name != "" {
		return name
	}
	for _, prefix := range []string{qom.NamedDevices + "/", "/machine/"} {
		if rest, found := strings.CutPrefix(path, prefix); found {
			return rest
		}
	}
	if path == "" {
		return name
	}
	return path
}

// fileName returns the name of an image, made absolute by QEMU's working directory dir, without the options that it was
// opened with.
func fileName(name, dir string) string {
	if text, is := strings.CutPrefix(name, "json:"); is {
		var options map[string]any
		if json.Unmarshal([]byte(text), &options) == nil {
			if parts := locations(options); len(parts) > 0 {
				name = strings.Join(parts, " ")
			}
		}
	}
	name = strings.TrimPrefix(name, "file:")
	switch {
	case filepath.IsAbs(name):
		return filepath.Clean(name)
	case name == "" || qemu.HasProtocol(name) || strings.Contains(name, " "):
		return name
	}
	return filepath.Join(dir, name)
}

// locations returns the values of the options that locate an image (BlockdevOptions in qapi/block-core.json), sorted.
// Those of its backing image are left out.
func locations(options map[string]any) []string {
	var found []string
	for key, value := range options {
		switch value := value.(type) {
		case map[string]any:
			if key != "backing" {
				found = append(found, locations(value)...)
			}
		case string:
			switch key {
			case "filename", "path", "host", "port", "export", "pool", "namespace", "image", "snapshot", "url", "volume",
				"server", "portal", "target", "lun", "cluster", "vdi", "dir":
				found = append(found, value)
			}
		}
	}
	slices.Sort(found)
	return found
}

// isTemporary says whether an image is a temporary file of QEMU's (snapshot=on), which QEMU has unlinked
// (bdrv_append_temp_snapshot in QEMU's block.c).
func isTemporary(vm *qemu.VM, file string) bool {
	return strings.HasPrefix(filepath.Base(file), "vl.") && !HasFile(vm, file)
}

// HasFile says whether a QEMU finds a file of that name. If that cannot be checked, the answer is yes.
func HasFile(vm *qemu.VM, file string) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/root%s", vm.Pid, file))
	return !errors.Is(err, fs.ErrNotExist)
}

// written says whether a drive was written to since this QEMU opened it.
func written(ctx context.Context, vm *qemu.VM, name, device string) (bool, error) {
	var drives []struct {
		Name   string `json:"device"`
		Device string `json:"qdev"`
		Stats  struct {
			Writes uint64 `json:"wr_operations"`
		} `json:"stats"`
	}
	if err := vm.QMP.Do(ctx, "query-blockstats", nil, &drives); err != nil {
		return false, err
	}
	for _, d := range drives {
		if d.Name == name && d.Device == device && d.Stats.Writes > 0 {
			return true, nil
		}
	}
	return false, nil
}

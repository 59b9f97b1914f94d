// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu/check"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Changed returns a failed result for each change of a VM since the destination was prepared for it.
func Changed(before, now *migratedv1.MachineDescription) []check.Result {
	const again = "migrate the VM again: the destination is compared with it as it is then"
	var found differences
	gone, came := unequal(before.GetDevices(), now.GetDevices(), nameOf)
	for _, name := range came {
		found.add("devices", again, "%s was plugged in after the destination was prepared", name)
	}
	for _, name := range gone {
		found.add("devices", again, "%s was unplugged after the destination was prepared", name)
	}
	cpuName := func(c *migratedv1.Cpu) string { return c.GetPlace() }
	if gone, came := unequal(before.GetCpus(), now.GetCpus(), cpuName); len(gone)+len(came) > 0 {
		found.add("CPUs", again, "the VM has %d instead of %d since the destination was prepared",
			len(now.GetCpus()), len(before.GetCpus()))
	}
	driveName := func(d *migratedv1.Drive) string {
		name := fmt.Sprintf("the drive %q with %s", d.GetName(), chain(d))
		if d.GetThrottling() != "" {
			name += " and " + throttlingName(d)
		}
		return name
	}
	gone, came = unequal(before.GetDrives(), now.GetDrives(), driveName)
	for _, name := range came {
		found.add("drives", again, "%s came after the destination was prepared", name)
	}
	for _, name := range gone {
		found.add("drives", again, "%s is gone since the destination was prepared", name)
	}
	for _, drive := range now.GetDrives() {
		if images := drive.GetImages(); len(images) > 0 && images[0].GetWritten() {
			found.drive(drive, drive, Destination{})
		}
	}
	return found
}

// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"cmp"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu/check"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Remedies for differences.
const (
	sameHosts = "configure the destination's QEMU as the source's, with --template, " +
		"or start it yourself that way (--to-qmp)"
	plugged = "add it to the destination's command line with --template, " +
		"or start the QEMU there yourself with it (--to-qmp), or unplug it at the source"
	unplugged = "leave it out of the destination's command line with --template, " +
		"or start the QEMU there yourself without it (--to-qmp)"
	limited = "give the drive these limits in the destination's command line with --template, " +
		"or start the QEMU there yourself with them (--to-qmp), " +
		"or take them off at the source (QMP block_set_io_throttle) and set them at the destination when the VM has moved"
	present = "name the image that the source has now in the destination's command line with --template, " +
		"or start the QEMU there yourself with it (--to-qmp)"
)

// A Destination has what Compare needs of the destination besides its description.
type Destination struct {
	// Chosen says that an operator chose its command line, which may name the same images in other directories.
	Chosen bool
	// Has says whether its QEMU finds a file of that name.
	Has func(file string) bool
}

// Compare returns a failed result for each difference between the VM at the source and the one that waits at the
// destination. If source is nil, as from an older daemon, there are none.
func Compare(source, waits *migratedv1.MachineDescription, destination Destination) []check.Result {
	if source == nil {
		return nil
	}
	var found differences
	found.hosts(source, waits)
	found.cpus(source, waits)
	found.devices(source, waits)
	found.drives(source, waits, destination)
	return found
}

// differences collects results.
type differences []check.Result

func (d *differences) add(subject, remedy, format string, args ...any) {
	*d = append(*d, check.Result{
		Subject: subject, Status: check.Failed, Detail: fmt.Sprintf(format, args...), Remedy: remedy,
	})
}

func (d *differences) hosts(source, waits *migratedv1.MachineDescription) {
	names := map[bool]string{true: "KVM", false: "TCG, or another one that is not KVM"}
	if source.GetKvm() != waits.GetKvm() {
		d.add("accelerator", "have both QEMUs use the same accelerator: load the module kvm at both hosts, and see -accel",
			"the source's is %s, the destination's %s", names[source.GetKvm()], names[waits.GetKvm()])
	}
	if source.GetUuid() != "" && source.GetUuid() != waits.GetUuid() {
		d.add("UUID", "give the destination's QEMU the option -uuid "+source.GetUuid()+", if it is to have this VM",
			"the source's is %s, the destination's %s", source.GetUuid(), waits.GetUuid())
	}
	if source.GetGenerationId() != "" && source.GetGenerationId() != waits.GetGenerationId() {
		d.add("generation id", "give the destination's QEMU the option -device vmgenid,guid="+source.GetGenerationId()+
			": with another one the guest takes itself for a copy of a VM",
			"the source's is %s, the destination's %s", source.GetGenerationId(), cmp.Or(waits.GetGenerationId(), "none"))
	}
}

func (d *differences) cpus(source, waits *migratedv1.MachineDescription) {
	cpuName := func(c *migratedv1.Cpu) string { return strings.TrimSpace(c.GetClass() + " " + c.GetPlace()) }
	lacks, has := unequal(source.GetCpus(), waits.GetCpus(), cpuName)
	if len(lacks)+len(has) > 0 {
		d.add("CPUs", "give the destination's QEMU the same -cpu and -smp, and CPUs that were plugged in, with --template",
			"the source has %d, the destination %d; %s", len(source.GetCpus()), len(waits.GetCpus()), onOneHost(lacks, has))
		return // their features differ, too
	}
	if !source.GetKvm() && source.GetQemuVersion() != waits.GetQemuVersion() {
		return // the emulated features differ a little between versions: -cpu max has no PCOMMIT in 10.0
	}
	for _, word := range source.GetFeatures() {
		var here uint32
		for _, w := range waits.GetFeatures() {
			if w.GetLeaf() == word.GetLeaf() && w.GetSubleaf() == word.GetSubleaf() && w.GetRegister() == word.GetRegister() {
				here = w.GetBits()
			}
		}
		if missing := word.GetBits() &^ here; missing != 0 {
			d.add("CPUs", "start the VM with a -cpu model that both hosts have",
				"the destination's CPUs lack features that the guest has seen: bits %#x of %s, CPUID %#x, %#x",
				missing, word.GetRegister(), word.GetLeaf(), word.GetSubleaf())
		}
	}
}

// onOneHost lists what only the source has, and what only the destination has.
func onOneHost(source, destination []string) string {
	var parts []string
	if len(source) > 0 {
		parts = append(parts, "the source alone has "+strings.Join(source, "; "))
	}
	if len(destination) > 0 {
		parts = append(parts, "the destination alone has "+strings.Join(destination, "; "))
	}
	return strings.Join(parts, ", ")
}

// unequal returns the names of the elements that only one list has, or has more often than the other.
func unequal[T any](a, b []T, name func(T) string) (aAlone, bAlone []string) {
	for _, x := range b {
		bAlone = append(bAlone, name(x))
	}
	for _, x := range a {
		if i := slices.Index(bAlone, name(x)); i >= 0 {
			bAlone = slices.Delete(bAlone, i, i+1)
		} else {
			aAlone = append(aAlone, name(x))
		}
	}
	return aAlone, bAlone
}

// nameOf returns a name for a device: its id with its class and place, or these alone if it has no id.
func nameOf(v *migratedv1.Device) string {
	what := strings.TrimSpace(v.GetClass() + " " + v.GetPlace())
	if v.GetId() == "" {
		return what
	}
	return fmt.Sprintf("%q (%s)", v.GetId(), what)
}

func (d *differences) devices(source, waits *migratedv1.MachineDescription) {
	lacks, has := unequal(source.GetDevices(), waits.GetDevices(), nameOf)
	for _, name := range lacks {
		if id, what, given := strings.Cut(name, " ("); given {
			if i := slices.IndexFunc(has, func(other string) bool { return strings.HasPrefix(other, id+" (") }); i >= 0 {
				_, other, _ := strings.Cut(has[i], " (")
				has = slices.Delete(has, i, i+1)
				d.add("devices", sameHosts, "%s is %s at the source and %s at the destination",
					id, strings.TrimSuffix(what, ")"), strings.TrimSuffix(other, ")"))
				continue
			}
		}
		d.add("devices", plugged, "the destination lacks %s: "+
			"if it was plugged in while the VM ran, it is not on the source's command line", name)
	}
	for _, name := range has {
		d.add("devices", unplugged, "the destination has %s, which the source has not: "+
			"if it was unplugged while the VM ran, it is still on the source's command line", name)
	}
	if source.GetQemuVersion() != waits.GetQemuVersion() {
		return // the built-in devices of a machine differ between versions
	}
	lacks, has = unequal(source.GetBuiltIn(), waits.GetBuiltIn(), func(class string) string { return class })
	if len(lacks)+len(has) > 0 {
		d.add("devices", sameHosts, "the built-in devices differ: %s", onOneHost(lacks, has))
	}
}

func (d *differences) drives(source, waits *migratedv1.MachineDescription, destination Destination) {
	here := map[string]*migratedv1.Drive{}
	for _, drive := range waits.GetDrives() {
		here[drive.GetName()] = drive
	}
	for _, drive := range source.GetDrives() {
		other, exists := here[drive.GetName()]
		delete(here, drive.GetName())
		if !exists {
			d.add("drives", present, "the destination lacks the drive %q, which has %s at the source",
				drive.GetName(), chain(drive))
			continue
		}
		d.drive(drive, other, destination)
	}
	for _, drive := range waits.GetDrives() {
		if here[drive.GetName()] != nil && len(drive.GetImages()) > 0 {
			d.add("drives", unplugged, "the destination has the drive %q with %s, and the source has no such drive",
				drive.GetName(), chain(drive))
		}
	}
}

func (d *differences) drive(source, waits *migratedv1.Drive, destination Destination) {
	name := source.GetName()
	top := source.GetImages()
	switch {
	case len(top) > 0 && top[0].GetWritten():
		d.add("drives", "shut the VM down, and start it without -snapshot and snapshot=on",
			"the VM has written to the drive %q (snapshot=on): QEMU keeps the changes in a temporary file, "+
				"which no other host gets", name)
	case !sameImages(source, waits, destination):
		d.add("drives", present, "the drive %q has %s at the source, and would have %s at the destination: "+
			"it is not on the source's command line if it was changed while the VM ran "+
			"(by a snapshot, a mirror, another medium)", name, chain(source), chain(waits))
	case source.GetReadOnly() != waits.GetReadOnly():
		mode := map[bool]string{true: "read-only", false: "writable"}
		d.add("drives", sameHosts, "the drive %q is %s at the source and %s at the destination", name,
			mode[source.GetReadOnly()], mode[waits.GetReadOnly()])
	}
	if source.Throttling != nil && source.GetThrottling() != waits.GetThrottling() {
		d.add("drives", limited, "the drive %q has %s at the source and %s at the destination: "+
			"throttling is not on the source's command line if it was changed while the VM ran", name,
			throttlingName(source), throttlingName(waits))
	}
}

// sameImages says whether two drives have the same chain of images. Files are compared by name.
func sameImages(source, waits *migratedv1.Drive, destination Destination) bool {
	return slices.EqualFunc(source.GetImages(), waits.GetImages(), func(a, b *migratedv1.Image) bool {
		return a.GetFormat() == b.GetFormat() && a.GetSize() == b.GetSize() && a.GetTemporary() == b.GetTemporary() &&
			(a.GetTemporary() || sameFile(a.GetFile(), b.GetFile(), destination))
	})
}

// descriptors begins the names of files that QEMU was given as open descriptors. Such a name does not identify a file.
const descriptors = "/dev/fdset/"

// sameFile says whether two names mean the same file, as far as that can be told.
func sameFile(source, waits string, destination Destination) bool {
	switch {
	case source == waits, strings.HasPrefix(source, descriptors) && strings.HasPrefix(waits, descriptors):
		return true
	case !destination.Chosen || filepath.Base(source) != filepath.Base(waits):
		return false
	}
	// The same storage, mounted in another directory. If the destination has a file of the source's name as well, the
	// two are different files.
	return !destination.Has(source)
}

// throttlingName names the limits of a drive.
func throttlingName(d *migratedv1.Drive) string {
	if d.GetThrottling() == "" {
		return "no throttling"
	}
	return "the throttling " + d.GetThrottling()
}

// chain lists the images of a drive, from the top to the base.
func chain(d *migratedv1.Drive) string {
	if len(d.GetImages()) == 0 {
		return "no medium"
	}
	var names []string
	for _, i := range d.GetImages() {
		name := i.GetFile()
		if i.GetTemporary() {
			name = "a temporary file"
		}
		names = append(names, fmt.Sprintf("%s (%s, %d MiB)", name, i.GetFormat(), i.GetSize()>>20))
	}
	return strings.Join(names, " on ")
}

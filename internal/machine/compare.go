// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/migrated-vm/migrated/internal/qemu"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// What to do about a difference.
const (
	sameHosts = "give the destination's QEMU the source's, with --template, or by starting it yourself (--to-qmp)"
	plugged   = "add it to the destination's command line with --template, or start the QEMU there yourself with it (--to-qmp), " +
		"or unplug it at the source"
	unplugged = "leave it out of the destination's command line with --template, or start the QEMU there yourself without it (--to-qmp)"
	present   = "name the image that the source has now in the destination's command line with --template, " +
		"or start the QEMU there yourself with it (--to-qmp)"
)

// A Destination is what Compare knows of the destination besides its description.
type Destination struct {
	// Chosen says that an operator has chosen its command line, which may have the same images under other directories.
	Chosen bool
	// Has says whether its QEMU finds a file of that name.
	Has func(file string) bool
}

// Compare says in what the VM that waits at the destination is another than the source's, each difference a result that
// failed. A source that describes nothing differs in nothing.
func Compare(source, waits *migratedv1.MachineDescription, destination Destination) []qemu.Result {
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

// differences are collected.
type differences []qemu.Result

func (d *differences) add(subject, remedy, format string, args ...any) {
	*d = append(*d, qemu.Result{Subject: subject, Status: qemu.Failed, Detail: fmt.Sprintf(format, args...), Remedy: remedy})
}

func (d *differences) hosts(source, waits *migratedv1.MachineDescription) {
	called := map[bool]string{true: "KVM", false: "TCG, or another one that is not KVM"}
	if source.GetKvm() != waits.GetKvm() {
		d.add("accelerator", "have both QEMUs use the same accelerator: load the module kvm at both hosts, and see -accel",
			"the source's is %s, the destination's %s", called[source.GetKvm()], called[waits.GetKvm()])
	}
	if source.GetUuid() != "" && source.GetUuid() != waits.GetUuid() {
		d.add("UUID", "give the destination's QEMU the option -uuid "+source.GetUuid()+", if it is to have this VM",
			"the source's is %s, the destination's %s", source.GetUuid(), waits.GetUuid())
	}
}

func (d *differences) cpus(source, waits *migratedv1.MachineDescription) {
	called := func(c *migratedv1.Cpu) string { return strings.TrimSpace(c.GetClass() + " " + c.GetPlace()) }
	lacks, has := unequal(source.GetCpus(), waits.GetCpus(), called)
	if len(lacks)+len(has) > 0 {
		d.add("CPUs", "give the destination's QEMU the same -cpu and -smp, and CPUs that were plugged in, with --template",
			"the source has %d, the destination %d; %s", len(source.GetCpus()), len(waits.GetCpus()), onOneHost(lacks, has))
		return // their features differ, too
	}
	if !source.GetKvm() && source.GetQemuVersion() != waits.GetQemuVersion() {
		return // what is emulated changes a little with each version: PCOMMIT of -cpu max is gone in 10.0
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
				"the destination's lack features that the guest has found: bits %#x of %s, CPUID %#x, %#x",
				missing, word.GetRegister(), word.GetLeaf(), word.GetSubleaf())
		}
	}
}

// onOneHost names what one of two hosts has alone.
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

// unequal returns how those are called that one list has more often than the other.
func unequal[T any](a, b []T, called func(T) string) (aAlone, bAlone []string) {
	for _, x := range b {
		bAlone = append(bAlone, called(x))
	}
	for _, x := range a {
		if i := slices.Index(bAlone, called(x)); i >= 0 {
			bAlone = slices.Delete(bAlone, i, i+1)
		} else {
			aAlone = append(aAlone, called(x))
		}
	}
	return aAlone, bAlone
}

// nameOf is what a device is called: by its id, or else by what it is.
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
		d.add("devices", plugged, "the destination lacks %s: it is not on the source's command line if it was plugged in while the VM ran",
			name)
	}
	for _, name := range has {
		d.add("devices", unplugged, "the destination has %s, which the source has not: it is still on the source's command line "+
			"if it was unplugged while the VM ran", name)
	}
	if source.GetQemuVersion() != waits.GetQemuVersion() {
		return // what comes with a machine is made of other parts
	}
	lacks, has = unequal(source.GetBuiltIn(), waits.GetBuiltIn(), func(class string) string { return class })
	if len(lacks)+len(has) > 0 {
		d.add("devices", sameHosts, "of what comes with the machine, %s", onOneHost(lacks, has))
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
			d.add("drives", present, "the destination lacks the drive %q, which has %s at the source", drive.GetName(), chain(drive))
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
			"the VM has written to the drive %q, of which QEMU keeps changes in a temporary file (snapshot=on): no other host gets that", name)
	case !sameImages(source, waits, destination):
		d.add("drives", present, "the drive %q has %s at the source, and would have %s at the destination: "+
			"it is not on the source's command line if it was changed while the VM ran (by a snapshot, a mirror, another medium)",
			name, chain(source), chain(waits))
	case source.GetReadOnly() != waits.GetReadOnly():
		mode := map[bool]string{true: "read-only", false: "writable"}
		d.add("drives", sameHosts, "the drive %q is %s at the source and %s at the destination", name,
			mode[source.GetReadOnly()], mode[waits.GetReadOnly()])
	}
}

// sameImages says whether two drives have the same images, one behind the other. A file is known by its name.
func sameImages(source, waits *migratedv1.Drive, destination Destination) bool {
	return slices.EqualFunc(source.GetImages(), waits.GetImages(), func(a, b *migratedv1.Image) bool {
		return a.GetFormat() == b.GetFormat() && a.GetSize() == b.GetSize() && a.GetTemporary() == b.GetTemporary() &&
			(a.GetTemporary() || sameFile(a.GetFile(), b.GetFile(), destination))
	})
}

// descriptors is the beginning of names that QEMU gives to files which it was handed open. It says nothing.
const descriptors = "/dev/fdset/"

func sameFile(source, waits string, destination Destination) bool {
	switch {
	case source == waits, strings.HasPrefix(source, descriptors) && strings.HasPrefix(waits, descriptors):
		return true
	case !destination.Chosen || filepath.Base(source) != filepath.Base(waits):
		return false
	}
	// A storage that is mounted elsewhere. If the source's name is one here, too, it is that of another file.
	return !destination.Has(source)
}

// chain names the images of a drive.
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

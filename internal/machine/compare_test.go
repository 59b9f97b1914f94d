// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func vm() *migratedv1.MachineDescription {
	return &migratedv1.MachineDescription{
		QemuVersion: "7.2.22",
		Cpus:        []*migratedv1.Cpu{{Class: "max-x86_64-cpu", Place: "socket-id 0"}},
		Features:    []*migratedv1.CpuidWord{{Leaf: 7, Register: "EBX", Bits: 0b110}},
		Devices: []*migratedv1.Device{
			{Id: "disk", Class: "virtio-blk-pci", Place: "pcie.0 02.0"},
			{Class: "VGA", Place: "pcie.0 03.0"},
			{Class: "VGA", Place: "pcie.0 04.0"},
		},
		BuiltIn: []string{"hpet", "isa-pit"},
		Drives: []*migratedv1.Drive{
			{Name: "cd", ReadOnly: true},
			{Name: "disk", Images: []*migratedv1.Image{
				{File: "/san/overlay", Format: "qcow2", Size: 1 << 20}, {File: "/san/base", Format: "raw", Size: 1 << 20},
			}},
			{Name: "scratch", Images: []*migratedv1.Image{
				{File: "/var/tmp/vl.AAAAAA", Format: "qcow2", Size: 1 << 20, Temporary: true},
				{File: "/san/scratch", Format: "raw", Size: 1 << 20},
			}},
		},
	}
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(source, waits *migratedv1.MachineDescription)
		want   []string // words of each difference
	}{
		{"equal", func(_, _ *migratedv1.MachineDescription) {}, nil},
		{"accelerator", func(s, _ *migratedv1.MachineDescription) { s.Kvm = true }, []string{"the source's is KVM"}},
		{"UUID", func(s, w *migratedv1.MachineDescription) {
			s.Uuid, w.Uuid = "9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11", "00000000-0000-0000-0000-000000000000"
		}, []string{"the source's is 9fe3ea4e-0c0c-4d3f-9a37-5a0c6e1f8d11, the destination's 00000000"}},
		{"UUID that an older source does not tell", func(_, w *migratedv1.MachineDescription) { w.Uuid = "00000000" }, nil},
		{"CPU plugged in", func(s, _ *migratedv1.MachineDescription) {
			s.Cpus = append(s.Cpus, &migratedv1.Cpu{Class: "max-x86_64-cpu", Place: "socket-id 1"})
		}, []string{"the source has 2, the destination 1; the source alone has max-x86_64-cpu socket-id 1"}},
		{"CPU model", func(_, w *migratedv1.MachineDescription) { w.Cpus[0].Class = "qemu64-x86_64-cpu" },
			[]string{"the source alone has max-x86_64-cpu socket-id 0, " +
				"the destination alone has qemu64-x86_64-cpu socket-id 0"}},
		{"CPU feature missing", func(_, w *migratedv1.MachineDescription) { w.Features[0].Bits = 0b1010 },
			[]string{"bits 0x4 of EBX, CPUID 0x7"}},
		{"CPU feature missing in KVM of another version", func(s, w *migratedv1.MachineDescription) {
			s.Kvm, w.Kvm, w.QemuVersion, w.Features[0].Bits = true, true, "10.0.2", 0b10
		}, []string{"bits 0x4 of EBX, CPUID 0x7"}},
		{"CPU feature that another version does not emulate", func(_, w *migratedv1.MachineDescription) {
			w.QemuVersion, w.Features[0].Bits = "10.0.2", 0b10
		}, nil},
		{"more CPU features", func(_, w *migratedv1.MachineDescription) { w.Features[0].Bits = 0b1110 }, nil},
		{"device plugged in", func(s, _ *migratedv1.MachineDescription) {
			s.Devices = append(s.Devices, &migratedv1.Device{Id: "hot", Class: "e1000", Place: "pcie.0 05.0"})
		}, []string{`lacks "hot" (e1000 pcie.0 05.0)`}},
		{"device unplugged", func(s, _ *migratedv1.MachineDescription) { s.Devices = s.Devices[:2] },
			[]string{"the destination has VGA pcie.0 04.0"}},
		{"device elsewhere", func(_, w *migratedv1.MachineDescription) { w.Devices[0].Place = "pcie.0 09.0" },
			[]string{`"disk" is virtio-blk-pci pcie.0 02.0 at the source and virtio-blk-pci pcie.0 09.0 at the destination`}},
		{"built-in device", func(_, w *migratedv1.MachineDescription) { w.BuiltIn = w.BuiltIn[:1] },
			[]string{"the source alone has isa-pit"}},
		{"built-in device of another version", func(_, w *migratedv1.MachineDescription) {
			w.BuiltIn, w.QemuVersion = w.BuiltIn[:1], "10.0.2"
		}, nil},
		{"snapshot", func(_, w *migratedv1.MachineDescription) { w.Drives[1].Images = w.Drives[1].Images[1:] },
			[]string{"/san/overlay (qcow2, 1 MiB) on /san/base (raw, 1 MiB) at the source, " +
				"and would have /san/base (raw, 1 MiB)"}},
		{"another image", func(_, w *migratedv1.MachineDescription) { w.Drives[1].Images[0].File = "/san/other" },
			[]string{"/san/other"}},
		{"another base", func(_, w *migratedv1.MachineDescription) { w.Drives[1].Images[1].File = "/san/other" },
			[]string{"/san/other"}},
		{"another format", func(_, w *migratedv1.MachineDescription) { w.Drives[1].Images[1].Format = "qcow2" },
			[]string{"/san/base (qcow2, 1 MiB) at the destination"}},
		{"another size", func(_, w *migratedv1.MachineDescription) { w.Drives[1].Images[0].Size = 2 << 20 },
			[]string{"/san/overlay (qcow2, 2 MiB)"}},
		{"read-only", func(_, w *migratedv1.MachineDescription) { w.Drives[1].ReadOnly = true },
			[]string{"writable at the source and read-only at the destination"}},
		{"throttled", func(s, _ *migratedv1.MachineDescription) {
			s.Drives[1].Throttling = proto.String("bps 1000000, group disk")
		}, []string{`the drive "disk" has the throttling bps 1000000, group disk at the source and no throttling`}},
		{"throttled at the destination", func(s, w *migratedv1.MachineDescription) {
			s.Drives[1].Throttling, w.Drives[1].Throttling = proto.String(""), proto.String("iops 5, group disk")
		}, []string{"has no throttling at the source and the throttling iops 5, group disk at the destination"}},
		{"throttling that an older source does not tell", func(_, w *migratedv1.MachineDescription) {
			w.Drives[1].Throttling = proto.String("iops 5, group disk")
		}, nil},
		{"generation id", func(s, _ *migratedv1.MachineDescription) { s.GenerationId = "324e6eaf" },
			[]string{"the source's is 324e6eaf, the destination's none"}},
		{"generation id that an older source does not tell", func(_, w *migratedv1.MachineDescription) {
			w.GenerationId = "324e6eaf"
		}, nil},
		{"ejected", func(_, w *migratedv1.MachineDescription) {
			w.Drives[0].Images = []*migratedv1.Image{{File: "/san/cd", Format: "raw"}}
		}, []string{`the drive "cd" has no medium at the source`}},
		{"drive missing", func(_, w *migratedv1.MachineDescription) { w.Drives = w.Drives[1:] },
			[]string{`lacks the drive "cd", which has no medium`}},
		{"drive too many", func(s, w *migratedv1.MachineDescription) { s.Drives = s.Drives[:2] },
			[]string{`the drive "scratch" with a temporary file`}},
		{"temporary file of another name", func(_, w *migratedv1.MachineDescription) {
			w.Drives[2].Images[0].File = "/var/tmp/vl.BBBBBB"
		}, nil},
		{"written temporary file", func(s, _ *migratedv1.MachineDescription) { s.Drives[2].Images[0].Written = true },
			[]string{"written to the drive \"scratch\""}},
		{"handed over open", func(s, w *migratedv1.MachineDescription) {
			s.Drives[1].Images[0].File, w.Drives[1].Images[0].File = "/dev/fdset/1", "/dev/fdset/9"
		}, nil},
		{"all at once", func(s, w *migratedv1.MachineDescription) {
			s.Kvm, w.Cpus, w.Devices, w.Drives = true, nil, w.Devices[1:], w.Drives[1:]
		}, []string{"KVM", "the source has 1", `lacks "disk"`, `lacks the drive "cd"`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			source, waits := vm(), vm()
			c.change(source, waits)
			found := Compare(source, waits, Destination{})
			if len(found) != len(c.want) {
				t.Fatalf("differences %+v, want %d", found, len(c.want))
			}
			for i, r := range found {
				if !strings.Contains(r.Detail, c.want[i]) || r.Remedy == "" || r.Subject == "" || strings.Contains(r.Detail, "\n") {
					t.Errorf("difference %+v, want %q", r, c.want[i])
				}
			}
		})
	}
	if found := Compare(nil, vm(), Destination{}); found != nil {
		t.Errorf("a source that describes nothing differs: %+v", found)
	}
}

// TestSameImageElsewhere: an operator who chooses the destination's command line may have the same storage mounted in
// another directory.
func TestSameImageElsewhere(t *testing.T) {
	for _, c := range []struct {
		name   string
		file   string
		chosen bool
		has    bool // the source's name is one here, too
		same   bool
	}{
		{"not chosen", "/mnt/overlay", false, false, false},
		{"chosen", "/mnt/overlay", true, false, true},
		{"another one of that name", "/mnt/overlay", true, true, false},
		{"the base", "/san/base", true, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			waits := vm()
			waits.Drives[1].Images[0].File = c.file
			has := func(file string) bool { return c.has && file == "/san/overlay" }
			if found := Compare(vm(), waits, Destination{Chosen: c.chosen, Has: has}); (len(found) == 0) != c.same {
				t.Errorf("differences %+v", found)
			}
		})
	}
}

func TestChanged(t *testing.T) {
	before := vm()
	if found := Changed(before, vm()); len(found) != 0 {
		t.Fatalf("nothing has changed: %+v", found)
	}
	now := proto.CloneOf(before)
	now.Cpus = append(now.Cpus, &migratedv1.Cpu{Place: "socket-id 1"})
	now.Devices[0] = &migratedv1.Device{Id: "other", Class: "e1000", Place: "pcie.0 02.0"}
	now.Drives[1].Images = now.Drives[1].Images[1:]
	now.Drives[2].Images[0].Written = true
	now.Drives[0].Throttling = proto.String("bps 1000000, group cd")
	var all []string
	for _, r := range Changed(before, now) {
		if r.Remedy == "" {
			t.Errorf("no remedy: %+v", r)
		}
		all = append(all, r.Detail)
	}
	text := strings.Join(all, "\n")
	for _, word := range []string{
		`"other" (e1000 pcie.0 02.0) was plugged in`, `"disk" (virtio-blk-pci pcie.0 02.0) was unplugged`,
		"has 2 instead of 1", `the drive "disk" with /san/base (raw, 1 MiB) came`,
		`the drive "cd" with no medium and the throttling bps 1000000, group cd came`,
		"on /san/base (raw, 1 MiB) is gone", `written to the drive "scratch"`,
	} {
		if !strings.Contains(text, word) {
			t.Errorf("nothing says %q:\n%s", word, text)
		}
	}
}

func TestFileName(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"/a/../b", "/b"},
		{"b", "/dir/b"},
		{"file:b", "/dir/b"},
		{"nbd://host/export", "nbd://host/export"},
		{"", ""},
		{`json:{"driver":"qcow2","file":{"driver":"file","filename":"/var/tmp/vl.X"},` +
			`"backing":{"file":{"filename":"/base"}}}`, "/var/tmp/vl.X"},
		{`json:{"driver":"nbd","server.host":"h","server":{"host":"h","port":"10809","type":"inet"},"export":"e"}`,
			"10809 e h"},
		{"json:{", "json:{"},
	} {
		if got := fileName(c.name, "/dir"); got != c.want {
			t.Errorf("%s is %q, want %q", c.name, got, c.want)
		}
	}
}

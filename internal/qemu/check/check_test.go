// SPDX-License-Identifier: Apache-2.0

package check

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu/qemutest"
	"github.com/migrated-vm/migrated/pkg/uffd"
)

func find(results []Result, subject string) []Result {
	var found []Result
	for _, r := range results {
		if strings.HasPrefix(r.Subject, subject) {
			found = append(found, r)
		}
	}
	return found
}

func TestCheckVM(t *testing.T) {
	path := qemutest.RAMFile(t)
	disk := path + ".disk"
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, subject string
		args          []string
		want          Status
		detail        string
	}{
		{"good: state", "state", qemutest.RAM(path), OK, "running"},
		{"good: RAM", "RAM \"ram0\"", qemutest.RAM(path), OK, "64 MiB"},
		{"good: version", "QEMU version", qemutest.RAM(path), OK, "QEMU"},
		{"good: devices", "devices", qemutest.RAM(path), OK, "none"},
		{"good: no disks", "disks", qemutest.RAM(path), OK, "none"},
		{"paused", "state", append(qemutest.RAM(path), "-S"), Warning, "prelaunch"},
		{"a destination", "state", append(qemutest.RAM(path), "-S", "-incoming", "defer"), Failed, "inmigrate"},
		{"default RAM", "RAM \"pc.ram\"", []string{"-m", "64"}, OK, "private"},
		{"default RAM, what it means", "private RAM", []string{"-m", "64", "-nodefaults"}, OK, "only QEMU has"},
		{"RAM on a disk", "RAM", qemutest.RAM(t.TempDir() + "/ram"), Failed, "tmpfs"},
		{"blocker", "devices", append(qemutest.RAM(path),
			"-object", "memory-backend-file,id=peer,size=1M,share=on,mem-path="+path+".peer",
			"-device", "ivshmem-plain,memdev=peer,master=off"), Failed, "ivshmem"},
		{"local disk", "disks", append(qemutest.RAM(path),
			"-drive", "file="+disk+",format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"), Warning, disk},
		{"null disk", "disks", append(qemutest.RAM(path),
			"-drive", "file=null-co://,format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"), OK, "network"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := qemutest.Start(t, test.args...)
			found := find(VM(qemutest.Context(t), vm), test.subject)
			if len(found) != 1 && test.name != "blocker" { // refused twice, by QEMU and by its type's name
				t.Fatalf("results %+v", found)
			}
			r := found[0]
			if r.Status != test.want || !strings.Contains(r.Detail, test.detail) {
				t.Errorf("%v %+v, want %v with %q", r.Status, r, test.want, test.detail)
			}
			if (r.Remedy == "") != (test.want == OK) || strings.ContainsAny(r.Detail+r.Remedy, "\n") {
				t.Errorf("detail %q, remedy %q", r.Detail, r.Remedy)
			}
		})
	}
}

// TestCheckVMWhoseMemoryOthersUse checks that memory mapped by another process is refused: what that process does there
// raises no fault in QEMU's userfaultfd.
func TestCheckVMWhoseMemoryOthersUse(t *testing.T) {
	path := qemutest.RAMFile(t)
	_, vm := qemutest.Start(t, qemutest.RAM(path)...)
	_, other := qemutest.Start(t, append(qemutest.RAM(path), "-S")...)
	found := find(VM(qemutest.Context(t), vm), `RAM "ram0"`)
	if len(found) != 1 || found[0].Status != Failed ||
		!strings.Contains(found[0].Detail, fmt.Sprintf("process %d", other.Pid)) {
		t.Errorf("results %+v", found)
	}
}

func TestCheckVMThatDied(t *testing.T) {
	p, vm := qemutest.Start(t, qemutest.RAM(qemutest.RAMFile(t))...)
	if err := p.Kill(qemutest.Context(t)); err != nil {
		t.Fatal(err)
	}
	results := VM(qemutest.Context(t), vm)
	if len(results) != 1 || results[0].Status != Failed || results[0].Remedy == "" {
		t.Errorf("results %+v", results)
	}
}

func TestCheckHost(t *testing.T) {
	results := Host(qemutest.Context(t), false)
	if len(results) != 7 {
		t.Errorf("%d results", len(results))
	}
	for _, r := range results {
		if r.Subject == "" || r.Detail == "" || strings.ContainsAny(r.Detail+r.Remedy, "\n") ||
			(r.Status == OK) != (r.Remedy == "") {
			t.Errorf("result %+v", r)
		}
		if os.Geteuid() == 0 && r.Status == Failed {
			t.Errorf("root cannot migrate: %+v", r)
		}
		t.Logf("%v %s: %s", r.Status, r.Subject, r.Detail)
	}
}

// TestCheckSupervision checks that a host that accepts only a supervised userfaultfd says what it lacks for that.
func TestCheckSupervision(t *testing.T) {
	state, label, err := uffd.ProbeSupervision()
	if err != nil {
		t.Fatal(err)
	}
	for _, required := range []bool{false, true} {
		r := checkSupervision(required)
		if !strings.HasPrefix(r.Detail, state.String()) || !strings.Contains(r.Detail, label) {
			t.Errorf("%+v of what is %v, labelled %q", r, state, label)
		}
		want := OK
		switch {
		case state == uffd.Unsupervised && required:
			want = Failed
		case state == uffd.Unsupervised || label != "" && permissive():
			want = Warning
		}
		if r.Status != want || (want == OK) != (r.Remedy == "") {
			t.Errorf("required %v: %+v, want %v", required, r, want)
		}
		if want == Failed && !strings.Contains(r.Detail, "require_secure") {
			t.Errorf("%+v does not name the setting", r)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"fmt"
	"os"
	"strings"
	"testing"

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
	path := ramFile(t)
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
		{"good: state", "state", ram(path), OK, "running"},
		{"good: RAM", "RAM \"ram0\"", ram(path), OK, "64 MiB"},
		{"good: version", "QEMU version", ram(path), OK, "QEMU"},
		{"good: devices", "devices", ram(path), OK, "none"},
		{"good: no disks", "disks", ram(path), OK, "none"},
		{"paused", "state", append(ram(path), "-S"), Warning, "prelaunch"},
		{"a destination", "state", append(ram(path), "-S", "-incoming", "defer"), Failed, "inmigrate"},
		{"default RAM", "RAM \"pc.ram\"", []string{"-m", "64"}, OK, "private"},
		{"default RAM, what it means", "private RAM", []string{"-m", "64", "-nodefaults"}, OK, "QEMU's alone"},
		{"RAM on a disk", "RAM", ram(t.TempDir() + "/ram"), Failed, "tmpfs"},
		{"blocker", "devices", append(ram(path), "-object", "memory-backend-file,id=peer,size=1M,share=on,mem-path="+path+".peer",
			"-device", "ivshmem-plain,memdev=peer,master=off"), Failed, "ivshmem"},
		{"local disk", "disks", append(ram(path), "-drive", "file="+disk+",format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"), Warning, disk},
		{"null disk", "disks", append(ram(path), "-drive", "file=null-co://,format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"), OK, "network"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, vm := start(t, test.args...)
			found := find(CheckVM(testContext(t), vm), test.subject)
			if len(found) != 1 && test.name != "blocker" { // which is refused by QEMU and by its name
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

// What another process does to the VM's memory raises no fault of QEMU's.
func TestCheckVMWhoseMemoryOthersUse(t *testing.T) {
	path := ramFile(t)
	_, vm := start(t, ram(path)...)
	_, other := start(t, append(ram(path), "-S")...)
	found := find(CheckVM(testContext(t), vm), `RAM "ram0"`)
	if len(found) != 1 || found[0].Status != Failed || !strings.Contains(found[0].Detail, fmt.Sprintf("process %d", other.Pid)) {
		t.Errorf("results %+v", found)
	}
}

func TestCheckVMThatDied(t *testing.T) {
	p, vm := start(t, ram(ramFile(t))...)
	if err := p.Kill(testContext(t)); err != nil {
		t.Fatal(err)
	}
	results := CheckVM(testContext(t), vm)
	if len(results) != 1 || results[0].Status != Failed || results[0].Remedy == "" {
		t.Errorf("results %+v", results)
	}
}

func TestCheckHost(t *testing.T) {
	results := CheckHost(testContext(t), false)
	if len(results) != 6 {
		t.Errorf("%d results", len(results))
	}
	for _, r := range results {
		if r.Subject == "" || r.Detail == "" || strings.ContainsAny(r.Detail+r.Remedy, "\n") || (r.Status == OK) != (r.Remedy == "") {
			t.Errorf("result %+v", r)
		}
		if os.Geteuid() == 0 && r.Status == Failed {
			t.Errorf("root cannot migrate: %+v", r)
		}
		t.Logf("%v %s: %s", r.Status, r.Subject, r.Detail)
	}
}

// A host that is to be a destination only with a supervised userfaultfd says what it lacks for it.
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

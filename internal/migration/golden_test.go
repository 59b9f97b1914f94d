// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/uffd"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// Each version of a daemon's files has a directory testdata/state-vN that a daemon of that version wrote. The tests
// read it as long as version.OldestState covers it. It is never written again.
var writeGolden = flag.Bool("write-golden", false, "write testdata/state-vN for a new version.State")

func goldenDir(v uint32) string { return filepath.Join("testdata", fmt.Sprintf("state-v%d", v)) }

// goldenRecord and goldenFacts have a value in every field. They never change: a field that is added later is empty
// in them and omitted from the file.
func goldenRecord() Record {
	noDescription := true
	return Record{
		Version: version.State, ID: "m1", VM: "/run/vm/qmp.sock",
		Identity:    process.Identity{PID: 4711, StartTime: 815, BootID: "b00t"},
		Destination: "192.0.2.2:7600", Committed: true, HandedOver: time.Date(2026, 5, 4, 12, 0, 0, 7, time.UTC),
		Protocol: 1, Spec: []byte(`{"vm":"/run/vm/qmp.sock","destination":"192.0.2.2:7600","keepSource":true}`),
		Token: "secret", WasRunning: true,
		Settings: &qemu.Settings{
			Capabilities: map[string]bool{"x-ignore-shared": false}, MaxBandwidth: 1 << 27,
			NoDescription: &noDescription,
		},
	}
}

func goldenFacts() (*keptFactsV1, *migratedv1.PrepareIncomingRequest) {
	request := &migratedv1.PrepareIncomingRequest{
		Id: "m1", Protocol: 1, OldestProtocol: 1, Token: "secret", PageAddresses: []string{"192.0.2.1:7600"},
		Machine: &migratedv1.SourceMachine{
			Name: "guest", QemuVersion: "7.2.22", MachineType: "pc-q35-7.2", CommandLine: []string{"qemu-system-x86_64", "-S"},
			Uid: 107, Gid: 108, Groups: []uint32{36}, WorkingDirectory: "/", QmpPath: "/run/vm/qmp.sock",
			RamBlocks: []*migratedv1.RamBlock{{Id: "ram0", Size: 20 * 4096, PageSize: 4096, File: "f"}},
		},
		DestinationQmp: "/run/vm/other.sock", DestinationTemplate: "/etc/template",
		Spec: &migratedv1.MigrationSpec{Vm: "/run/vm/qmp.sock", Destination: "192.0.2.2:7600", RequireSecure: true},
	}
	return &keptFactsV1{
		QEMU: process.Identity{PID: 4711, StartTime: 815, BootID: "b00t"}, QMP: "/run/vm/other.sock", RemoteFD: 23,
		Blocks:      []keptBlock{{ID: "ram0", Addr: 0x7f0000000000, Size: 20 * 4096, PageSize: 4096}},
		Discards:    true,
		Settings:    &qemu.Settings{Capabilities: map[string]bool{"late-block-activate": false}, MaxBandwidth: 1 << 27},
		Supervision: uffd.Flagged, Label: "u:object_r:uffd_t:s0",
	}, request
}

// goldenStates holds each page state once (pkg/postcopy, TestStatesAreAFormat) and some more.
var goldenStates = []byte{
	0x10, 0x32, 0x54, 0x76, 0x44, 0x44, 0x44, 0x44, 0x55, 0x00, 0x44, 0x44, 0x44, 0x44, 0x44, 0x44,
}

func setGoldenHeader(h *keptHeader) {
	h.loaded.Store(1)
	h.toldToRun.Store(2)
	h.resumed.Store(3)
	h.resumeTime.Store(4)
	h.downtime.Store(5)
	h.filled.Store(6)
}

// writeFiles returns the files as this daemon writes them.
func writeFiles(t *testing.T) map[string][]byte {
	t.Helper()
	dir := t.TempDir()
	records, err := OpenRecords(filepath.Join(dir, "handed-over"))
	if err != nil {
		t.Fatal(err)
	}
	if err := records.Prepare(goldenRecord()); err != nil {
		t.Fatal(err)
	}
	facts, request := goldenFacts()
	k, err := createKept(dir, facts, request)
	if err != nil {
		t.Fatal(err)
	}
	setGoldenHeader(k.header())
	copy(k.states(), goldenStates)
	if err := k.close(); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for name, path := range map[string]string{
		"record.json": records.commitPath("m1"), keptFacts: filepath.Join(dir, keptFacts),
		keptStates: filepath.Join(dir, keptStates),
	} {
		if files[name], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func TestFilesAreOfTheirVersion(t *testing.T) {
	for name, got := range writeFiles(t) {
		path := filepath.Join(goldenDir(version.State), name)
		if *writeGolden {
			if _, err := os.Lstat(path); err == nil {
				t.Fatalf("%s exists: it is what daemons of that version wrote, and does not change", path)
			}
			if err := errors.Join(os.MkdirAll(goldenDir(version.State), 0o755), os.WriteFile(path, got, 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s is written as\n%q\ninstead of\n%q\nIf a daemon of before would misunderstand that, "+
				"raise version.State, keep a reader of the version before and write its files with -write-golden; "+
				"a new field that may be missing is left out while it is empty.", name, got, want)
		}
	}
}

// TestFilesOfEveryVersionAreRead: after an upgrade, the daemon reads the files of earlier versions.
func TestFilesOfEveryVersionAreRead(t *testing.T) {
	for v := uint32(version.OldestState); v <= version.State; v++ {
		t.Run(fmt.Sprint(v), func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join(goldenDir(v), "record.json"))
			if err != nil {
				t.Fatal(err)
			}
			rec, err := readRecord(data, "golden")
			if err != nil {
				t.Fatal(err)
			}
			wantRecord := goldenRecord()
			wantRecord.Version = v
			if diff := cmp.Diff(wantRecord, rec); diff != "" {
				t.Errorf("record (-want +got):\n%s", diff)
			}
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(goldenDir(v))); err != nil {
				t.Fatal(err)
			}
			k, facts, request, err := takeUpKept(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer k.close()
			wantFacts, wantRequest := goldenFacts()
			wantFacts.Version, wantFacts.Request = v, facts.Request
			if diff := cmp.Diff(wantFacts, facts); diff != "" {
				t.Errorf("facts (-want +got):\n%s", diff)
			}
			if !proto.Equal(wantRequest, request) {
				t.Errorf("request\n%v\ninstead of\n%v", request, wantRequest)
			}
			h := k.header() // as setGoldenHeader left it
			for name, pair := range map[string][2]int64{
				"loaded": {int64(h.loaded.Load()), 1}, "told to run": {int64(h.toldToRun.Load()), 2},
				"resumed": {h.resumed.Load(), 3}, "resume time": {h.resumeTime.Load(), 4},
				"downtime": {h.downtime.Load(), 5}, "filled": {int64(h.filled.Load()), 6},
			} {
				if pair[0] != pair[1] {
					t.Errorf("%s is %d, want %d", name, pair[0], pair[1])
				}
			}
			if !bytes.Equal(k.states(), goldenStates) {
				t.Errorf("states are %x, want %x", k.states(), goldenStates)
			}
		})
	}
}

// TestFilesOfANewerVersion: an older daemon says what to do and changes nothing.
func TestFilesOfANewerVersion(t *testing.T) {
	newer := func(data []byte) []byte {
		return bytes.Replace(data,
			fmt.Appendf(nil, `"version":%d`, version.State), fmt.Appendf(nil, `"version":%d`, version.State+1), 1)
	}
	newerProtocol := func(data []byte) []byte {
		return bytes.Replace(data, []byte(`"protocol":1,`), fmt.Appendf(nil, `"protocol":%d,`, version.Protocol+1), 1)
	}
	newerPages := func(data []byte) []byte {
		data = bytes.Clone(data)
		data[0]++
		return data
	}
	for name, c := range map[string]struct {
		file   string
		change func([]byte) []byte
	}{
		"record": {"record.json", newer}, "record, protocol": {"record.json", newerProtocol},
		"facts": {keptFacts, newer}, "facts, protocol": {keptFacts, newerProtocol}, "pages": {keptStates, newerPages},
	} {
		t.Run(name, func(t *testing.T) {
			files := writeFiles(t)
			changed := c.change(files[c.file])
			if bytes.Equal(changed, files[c.file]) {
				t.Fatal("nothing was changed")
			}
			files[c.file] = changed
			dir := t.TempDir()
			for name, data := range files {
				if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			if c.file == "record.json" {
				_, err = (&Records{dir: dir}).All()
			} else {
				_, _, _, err = takeUpKept(dir)
			}
			var unknown *version.Error
			if !errors.As(err, &unknown) || Remedy(err) != otherDaemon {
				t.Errorf("%v; %s", err, Remedy(err))
			}
			for name, data := range files {
				if after, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(after, data) {
					t.Errorf("%s was changed: %v", name, err)
				}
			}
		})
	}
}

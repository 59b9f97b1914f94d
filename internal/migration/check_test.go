// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/internal/qmp"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestCheck compares real QEMUs: a VM that had a device plugged in while it ran, and the QEMU that its command line
// makes.
func TestCheck(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := newStageWith(t, ctx, &peer{}, "-device", "qemu-xhci,id=usb", "-device", "usb-tablet,id=tablet")
	s.source.cancel(ErrCancelled) // else the stage's own migration keeps the monitor
	<-s.source.Done()
	source := func() (all []check.Result, machine *migratedv1.SourceMachine) {
		t.Helper()
		all, machine = CheckSource(ctx, SourceConfig{
			Spec: &migratedv1.MigrationSpec{Vm: s.vm}, Records: s.records, Pages: s.pages, Log: slog.New(slog.DiscardHandler),
		})
		if machine == nil {
			t.Fatalf("the source says %+v", all)
		}
		return all, machine
	}
	// On another host all paths would be the same. Here they would be those of the running VM.
	elsewhere := func(machine *migratedv1.SourceMachine, directory string) *migratedv1.SourceMachine {
		machine = proto.CloneOf(machine)
		machine.QmpPath = strings.Replace(machine.GetQmpPath(), filepath.Dir(s.vm), directory, 1)
		for i, arg := range machine.GetCommandLine() {
			arg = strings.ReplaceAll(arg, filepath.Dir(s.vm), directory)
			machine.CommandLine[i] = strings.Replace(arg, "/dev/shm/handover-", directory+"/handover-", 1)
		}
		return machine
	}
	check := func(machine *migratedv1.SourceMachine, qmpPath string) string {
		t.Helper()
		directory, err := os.MkdirTemp("/dev/shm", "check-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(directory) })
		state := filepath.Join(t.TempDir(), "state")
		found := CheckDestination(ctx, DestinationConfig{
			Request: &migratedv1.PrepareIncomingRequest{
				Id: "check", Machine: elsewhere(machine, directory), DestinationQmp: qmpPath,
			},
			Dir: state, PipeDir: t.TempDir(), LogDir: t.TempDir(), Binaries: []string{"qemu-system-*"},
			Log: slog.New(slog.DiscardHandler),
		})
		if _, err := os.Stat(state); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("something is left: %v", err)
		}
		var says []string
		for _, r := range found {
			says = append(says, r.Status.String()+" "+r.Detail)
			if (r.Status == check.Failed) != (r.Remedy != "") {
				t.Errorf("result %+v", r)
			}
		}
		return strings.Join(says, "\n")
	}
	_, machine := source()
	if says := check(machine, ""); !strings.HasPrefix(says, "ok ") {
		if strings.Contains(says, inject.ErrForbidden.Error()) {
			testenv.CannotRun(t, "%s", says)
		}
		t.Errorf("a VM that can be moved: %s", says)
	}
	client, err := qmp.Dial(ctx, s.other)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Disconnect() //nolint:errcheck // QEMU is killed in the end
	plug := map[string]string{"driver": "usb-mouse", "id": "hot", "bus": "usb.0"}
	if err := client.Do(ctx, "device_add", plug, nil); err != nil {
		t.Fatal(err)
	}
	_, machine = source()
	if says := check(machine, ""); !strings.HasPrefix(says, "failed ") ||
		!strings.Contains(says, `lacks "hot" (usb-mouse usb.0)`) {
		t.Errorf("a VM into which a device was plugged: %s", says)
	}
	// A QEMU that somebody else started is compared, and not ended.
	waiting := newStageWith(t, ctx, &peer{},
		"-device", "qemu-xhci,id=usb", "-device", "usb-tablet,id=tablet", "-device", "usb-mouse,id=hot",
		"-S", "-incoming", "defer")
	waiting.source.cancel(ErrCancelled)
	<-waiting.source.Done()
	if says := check(machine, waiting.vm); !strings.HasPrefix(says, "ok ") {
		t.Errorf("a QEMU with that device: %s", says)
	}
	if waiting.vmRuns(t) {
		t.Error("it runs")
	}
}

// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"testing"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func destinationOf(machine *migratedv1.SourceMachine, cfg DestinationConfig) *Destination {
	cfg.Request = &migratedv1.PrepareIncomingRequest{Machine: machine}
	return &Destination{cfg: cfg}
}

func TestMayStartAs(t *testing.T) {
	ours := &process.Credentials{UID: 300, GID: 300}
	for name, test := range map[string]struct {
		uid, gid uint32
		groups   []uint32
		argv     []string
		least    int
		runAs    *process.Credentials
		ok       bool
	}{
		"a user":                  {uid: 107, gid: 107, groups: []uint32{36}, least: 1, ok: true},
		"root":                    {least: 1},
		"root, allowed":           {ok: true},
		"root's group":            {uid: 107, gid: 0, least: 1},
		"root's group besides":    {uid: 107, gid: 107, groups: []uint32{36, 0}, least: 1},
		"below the least":         {uid: 107, gid: 107, least: 1000},
		"the least":               {uid: 1000, gid: 107, least: 1000, ok: true},
		"the greatest":            {uid: 1<<32 - 1, gid: 107, least: 1000, ok: true},
		"root there, ours here":   {least: 1, runAs: ours, ok: true},
		"-runas, and ours":        {least: 0, runAs: ours, argv: []string{"-runas", "nobody"}},
		"-run-with, and ours":     {least: 0, runAs: ours, argv: []string{"-run-with", "user=nobody"}},
		"a name that looks alike": {least: 1, runAs: ours, argv: []string{"-name", "-runas"}, ok: true},
	} {
		d := destinationOf(&migratedv1.SourceMachine{Uid: test.uid, Gid: test.gid, Groups: test.groups},
			DestinationConfig{MinUID: test.least, RunAs: test.runAs})
		err := d.mayStartAs(append([]string{"qemu"}, test.argv...), d.user())
		if (err == nil) != test.ok || err != nil && Remedy(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCheckName: a source is allowed to send a VM by one name, and starts a VM with another.
func TestCheckName(t *testing.T) {
	d := destinationOf(&migratedv1.SourceMachine{Name: "web-1"}, DestinationConfig{})
	if err := d.checkName(&qemu.Facts{Name: "web-1"}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"db-1", ""} {
		if err := d.checkName(&qemu.Facts{Name: name}); err == nil {
			t.Errorf("%q is taken for web-1", name)
		}
	}
}

// TestSecretsAreNotShown: secrets appear neither in the API nor in messages on the network.
func TestSecretsAreNotShown(t *testing.T) {
	err := withRemedy(errors.New("QEMU ended: -object secret,id=a,data=hunter2"), "open https://u:hunter2@host/")
	if m := Describe(err); m.GetMessage() != "QEMU ended: -object secret,id=a,data=***" ||
		m.GetRemedy() != "open https://u:***@host/" {
		t.Errorf("it shows %v", m)
	}
}

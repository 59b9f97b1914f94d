// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestStatusOfUserfaultfd tests the line about the userfaultfd, for each kind of supervision.
func TestStatusOfUserfaultfd(t *testing.T) {
	for _, test := range []struct {
		supervision migratedv1.Supervision
		label, want string
	}{
		{migratedv1.Supervision_SUPERVISION_UNSPECIFIED, "", ""},
		{migratedv1.Supervision_SUPERVISION_UNSUPERVISED, "", "unsupervised"},
		{migratedv1.Supervision_SUPERVISION_LABELLED, "u:object_r:uffd_t:s0", "labelled u:object_r:uffd_t:s0"},
		{migratedv1.Supervision_SUPERVISION_FLAG, "", "flag"},
		{migratedv1.Supervision_SUPERVISION_FLAG, "u:object_r:uffd_t:s0", "flag, labelled u:object_r:uffd_t:s0"},
	} {
		m := at("db-1", 0, active, 64)
		m.Supervision, m.UserfaultfdLabel, m.Spec.RequireSecure = test.supervision, test.label, true
		var out bytes.Buffer
		if err := printStatus(&out, m); err != nil {
			t.Fatal(err)
		}
		facts := map[string]string{}
		for line := range strings.Lines(out.String()) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "  ")
			facts[name] = strings.TrimSpace(value)
		}
		if got := facts["Userfaultfd"]; got != test.want || facts["Required"] != "a supervised userfaultfd" {
			t.Errorf("status of %v, %q: %q; want %q\n%s", test.supervision, test.label, got, test.want, out.String())
		}
	}
}

func TestStatusOfEarlyLoad(t *testing.T) {
	ms := func(n int) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Millisecond) }
	for _, test := range []struct {
		early *migratedv1.EarlyLoad
		want  string
	}{
		{nil, ""},
		{&migratedv1.EarlyLoad{Loaded: true, Bytes: 1 << 20, Pause: ms(12), LoadTime: ms(180)},
			"Early load 1.0 MiB of device state in 180.0 ms, for which the VM stood still for 12.0 ms"},
		{&migratedv1.EarlyLoad{Reason: "it was switched off"}, "Early load no: it was switched off"},
		{&migratedv1.EarlyLoad{Reason: "QEMU ended", Pause: ms(9)},
			"Early load no: QEMU ended; the VM stood still for 9.0 ms"},
	} {
		m := at("db-1", 0, active, 64)
		m.EarlyLoad = test.early
		var out bytes.Buffer
		if err := printStatus(&out, m); err != nil {
			t.Fatal(err)
		}
		got := ""
		for line := range strings.Lines(out.String()) {
			if strings.HasPrefix(line, "Early load") {
				got = strings.Join(strings.Fields(line), " ")
			}
		}
		if got != test.want {
			t.Errorf("status says %q, want %q", got, test.want)
		}
	}
}

// TestDefinitionThatStays: whoever follows or looks at a migration learns that the domain is still defined at the
// source, and what to do.
func TestDefinitionThatStays(t *testing.T) {
	const why = "stays at the source: the VM ended; run here: virsh undefine db"
	m := at("db-1", 0, migratedv1.MigrationState_MIGRATION_STATE_COMPLETED, 64)
	m.Definition = why
	var status bytes.Buffer
	if err := printStatus(&status, m); err != nil {
		t.Fatal(err)
	}
	m.State = migratedv1.MigrationState_MIGRATION_STATE_ENDED
	var ended *failure
	if err := outcome(m); !errors.As(err, &ended) {
		t.Fatalf("a VM that ended: %v", err)
	}
	for where, said := range map[string]string{
		"status": status.String(), "the last line": summary(m), "the end": ended.remedy,
	} {
		if !strings.Contains(said, why) {
			t.Errorf("%s: %q", where, said)
		}
	}
}

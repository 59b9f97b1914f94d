// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// If supervision is required, the descriptor is supervised, or the error says who required it and what to do. Which
// of the two happens depends on the host.
func TestSupervise(t *testing.T) {
	made, err := uffd.Open(uffd.OpenOptions{UserModeOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer made.Close()
	state, label, err := made.Supervision()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("a userfaultfd of this process is %v, labelled %q", state, label)
	for _, test := range []struct {
		name              string
		byHost, byRequest bool
		words             []string // of the refusal
	}{
		{"nobody", false, false, nil},
		{"the host", true, false, []string{
			"unsupervised", "require_secure", "UFFD_SECURE", "unset require_secure", "kernel/README.md", "deploy/selinux",
		}},
		{"the migration", false, true, []string{
			"unsupervised", "--require-secure", "UFFD_SECURE", "without --require-secure",
			"kernel/README.md", "deploy/selinux",
		}},
		{"both", true, true, []string{"--require-secure"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := NewDestination(t.Context(), DestinationConfig{
				Request:       &migratedv1.PrepareIncomingRequest{Spec: &migratedv1.MigrationSpec{RequireSecure: test.byRequest}},
				RequireSecure: test.byHost, Log: slog.New(slog.DiscardHandler),
			})
			d.taken = &inject.Taken{UFFD: made}
			err := d.supervise()
			view, _ := d.Snapshot()
			if view.GetSupervision() != shownSupervision[state] || view.GetUserfaultfdLabel() != label {
				t.Errorf("it shows %v, labelled %q", view.GetSupervision(), view.GetUserfaultfdLabel())
			}
			if refused := err != nil; refused != (test.words != nil && state == uffd.Unsupervised) {
				t.Fatalf("%v: %v", state, err)
			}
			if err == nil {
				return
			}
			shown := Describe(err)
			for _, word := range test.words {
				if !strings.Contains(shown.GetMessage()+"\n"+shown.GetRemedy(), word) {
					t.Errorf("%q is not in %v", word, shown)
				}
			}
		})
	}
}

// An answer of a destination that does not know of the requirement is refused.
func TestConfirmSupervised(t *testing.T) {
	for supervision, met := range map[migratedv1.Supervision]bool{
		migratedv1.Supervision_SUPERVISION_UNSPECIFIED:  false,
		migratedv1.Supervision_SUPERVISION_UNSUPERVISED: false,
		migratedv1.Supervision_SUPERVISION_LABELLED:     true,
		migratedv1.Supervision_SUPERVISION_FLAG:         true,
		99:                                              false,
	} {
		for _, required := range []bool{false, true} {
			err := confirmSupervised(&migratedv1.MigrationSpec{RequireSecure: required},
				&migratedv1.PrepareIncomingResponse{Supervision: supervision})
			if (err == nil) != (met || !required) {
				t.Errorf("%v, required %v: %v", supervision, required, err)
			}
		}
	}
}

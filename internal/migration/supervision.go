// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"

	"github.com/migrated-vm/migrated/internal/qemu/check"
	"github.com/migrated-vm/migrated/pkg/uffd"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

var shownSupervision = map[uffd.Supervision]migratedv1.Supervision{
	uffd.Unsupervised: migratedv1.Supervision_SUPERVISION_UNSUPERVISED,
	uffd.Labelled:     migratedv1.Supervision_SUPERVISION_LABELLED,
	uffd.Flagged:      migratedv1.Supervision_SUPERVISION_FLAG,
}

// supervise shows how QEMU's userfaultfd is supervised. It refuses an unsupervised one if the source or this host
// requires supervision.
func (d *Destination) supervise() error {
	var err error
	d.supervision, d.label, err = d.taken.UFFD.Supervision()
	d.update(func(m *migratedv1.Migration) {
		m.Supervision, m.UserfaultfdLabel = shownSupervision[d.supervision], d.label
	})
	byMigration := d.cfg.Request.GetSpec().GetRequireSecure()
	switch {
	case d.supervision != uffd.Unsupervised || !byMigration && !d.cfg.RequireSecure:
		if err != nil {
			d.log.Warn("the label of the userfaultfd is unknown", "error", err)
		}
		return nil
	case err != nil:
		return fmt.Errorf("a supervised userfaultfd is required: %w", err)
	}
	required, unless := "the destination's require_secure requires a supervised one", "unset require_secure there"
	if byMigration {
		required, unless = "this migration requires a supervised one (--require-secure)", "migrate without --require-secure"
	}
	return withRemedy(
		fmt.Errorf("the destination QEMU's userfaultfd is unsupervised, and %s: %s", required, check.Unsupervised),
		fmt.Sprintf("on the destination, %s; or %s", check.Supervise, unless))
}

// confirmSupervised refuses a destination's answer that does not confirm the supervision that the migration requires.
// An older destination does not know of the requirement.
func confirmSupervised(spec *migratedv1.MigrationSpec, answer *migratedv1.PrepareIncomingResponse) error {
	switch answer.GetSupervision() {
	case migratedv1.Supervision_SUPERVISION_LABELLED, migratedv1.Supervision_SUPERVISION_FLAG:
		return nil
	}
	if !spec.GetRequireSecure() {
		return nil
	}
	return withRemedy(errors.New("the destination does not say that its userfaultfd is supervised, "+
		"which this migration requires"),
		"run the same version of migrated on both hosts")
}

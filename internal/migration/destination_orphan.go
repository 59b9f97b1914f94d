// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// fetchPrivateFirst marks the memory that is lost when the source's QEMU ends, so that it is fetched first. Once it has
// arrived, the VM survives the end of that QEMU. If RAM is a shared file, that memory is firmware and video memory: a
// small part. It marks nothing if no block is in a file.
func fetchPrivateFirst(blocks []postcopy.Block, source []*migratedv1.RamBlock) {
	inFile := func(b *migratedv1.RamBlock) bool { return b.GetFile() != "" }
	if len(source) != len(blocks) || !slices.ContainsFunc(source, inFile) {
		return
	}
	for i, b := range source {
		blocks[i].First = !inFile(b)
	}
}

// errOrphan says that the source's QEMU has ended, and what is lost with it.
var errOrphan = errors.New(
	"the source's QEMU has ended: memory that only it held, and that has not arrived, is lost")

// lostStatus is the status of a VM that has lost some of its memory.
const lostStatus = "threads of the VM that touch lost memory wait forever; they never read wrong data"

// sourceQEMUGone says whether the source's page server found that the QEMU whose memory it reads has ended.
func sourceQEMUGone(err error) bool {
	return errors.Is(err, postcopy.ErrLaneLost) && serverSays(err, migratedv1.Reason_REASON_SOURCE_QEMU_ENDED)
}

// serverSays says whether a page server ended a call with the given reason.
func serverSays(err error, reason migratedv1.Reason) bool {
	return slices.ContainsFunc(status.Convert(err).Details(), func(detail any) bool {
		said, ok := detail.(*migratedv1.MigrationError)
		return ok && said.GetReason() == reason
	})
}

// orphaned shows that some of the VM's memory is lost. The migration goes on and shows it until the VM ends: memory
// in files of the source may still arrive, and the VM may not need the rest. Only the operator ends the VM.
func (d *Destination) orphaned(err error) {
	d.orphan = true
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED,
		withRemedy(fmt.Errorf("%w (%w)", errOrphan, err),
			fmt.Sprintf("end the VM, which is process %d on the destination (%s does), and start it anew from its disks",
				d.taken.Pid, d.abandonCommand())),
		whereabouts{migratedv1.Location_LOCATION_DESTINATION, lostStatus})
}

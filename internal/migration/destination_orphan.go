// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// soonest has memory that ends with the source's QEMU come first, where other memory does not: the VM may lose that
// QEMU once it has come. Of a VM whose RAM is a shared file that is its firmware and its screen, a small part.
func soonest(blocks []postcopy.Block, source []*migratedv1.RamBlock) {
	inFile := func(b *migratedv1.RamBlock) bool { return b.GetFile() != "" }
	if len(source) != len(blocks) || !slices.ContainsFunc(source, inFile) {
		return
	}
	for i, b := range source {
		blocks[i].First = !inFile(b)
	}
}

// errOrphan says what the end of the source's QEMU costs.
var errOrphan = errors.New(
	"the source's QEMU has ended: memory of the VM that was that QEMU's alone, and is not here, is lost")

// lostStatus is what has become of a VM that some of its memory is lost of.
const lostStatus = "the VM stands still where it needs memory that is lost; nothing else is read in its place"

// sourceQEMUGone says whether the source's page server has found that the QEMU is gone whose memory it reads.
func sourceQEMUGone(err error) bool {
	return errors.Is(err, postcopy.ErrLaneLost) && serverSays(err, codes.DataLoss, pagesrv.ErrProcessGone)
}

// serverSays says whether a page server has ended a call with that reason. gRPC passes it on as text alone.
func serverSays(err error, code codes.Code, reason error) bool {
	return status.Code(err) == code && strings.Contains(err.Error(), reason.Error())
}

// orphaned says that some of the VM's memory cannot be had any more, and goes on saying it until the VM ends. What is
// in files of the source's host may come yet, and the VM may not need the rest: nobody ends it but its operator.
func (d *Destination) orphaned(err error) {
	d.orphan = true
	d.fail(migratedv1.MigrationState_MIGRATION_STATE_POSTCOPY_PAUSED,
		withRemedy(fmt.Errorf("%w (%w)", errOrphan, err),
			fmt.Sprintf("end the VM, which is process %d on the destination (%s does), and start it anew from its disks",
				d.taken.Pid, d.abandonCommand())),
		whereabouts{migratedv1.Location_LOCATION_DESTINATION, lostStatus})
}

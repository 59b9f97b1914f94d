// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/cgroup"
	"github.com/migrated-vm/migrated/internal/cgroup/cgrouptest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestCheckRoom uses real control groups.
func TestCheckRoom(t *testing.T) {
	const limit = 128 << 20
	name := fmt.Sprintf("%s-%d", t.Name(), os.Getpid())
	dir := cgrouptest.Limited(t, name, limit)
	groups, err := cgroup.At(name)
	if err != nil {
		t.Fatal(err)
	}
	machine := func(size uint64) *migratedv1.SourceMachine {
		return &migratedv1.SourceMachine{RamBlocks: []*migratedv1.RamBlock{
			{Size: size, PageSize: 4096}, {Size: 1 << 20, PageSize: 4096},
		}}
	}
	if err := checkCgroupRoom(machine(32<<20), groups, qemuNeeds); err != nil {
		t.Errorf("a VM that fits: %v", err)
	}
	err = checkCgroupRoom(machine(100<<20), groups, qemuNeeds)
	if !errors.Is(err, errNotInGroup) ||
		!strings.Contains(err.Error(), "it needs 165 MiB, and "+dir+" has 128 MiB left") || Remedy(err) == "" {
		t.Errorf("a VM that does not fit: %v", err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/migrated-vm/migrated/e2e/emulator"
)

// InstalledQEMU is the version of the machine's QEMU. Hosts use it unless UseQEMU sets another one.
const InstalledQEMU = "7.2"

// QEMUVersions are the versions of QEMU that a host can have, the oldest first.
var QEMUVersions = []string{InstalledQEMU, emulator.V10, emulator.V11}

// qemuModules is the directory of QEMU's modules below /usr.
const qemuModules = "lib/x86_64-linux-gnu/qemu"

// UseQEMU sets the version of QEMU on the host, one of QEMUVersions, for the lab and for the host's daemon. Call it
// before anything is started on the host: running processes keep their programs and libraries.
//
// The files of that QEMU are laid over those of /usr. All programs of the host then use its libraries, also the C
// library. That works, because a newer library of the same name has everything that they expect.
func (h *Host) UseQEMU(ctx context.Context, version string) error {
	if version == InstalledQEMU {
		return nil
	}
	dir, err := emulator.Dir(ctx, version)
	if err != nil {
		return err
	}
	files := filepath.Join(dir, "usr")
	for _, args := range [][]string{
		{"-t", "overlay", "-o", "lowerdir=" + files + ":/usr", "qemu-" + version, "/usr"},
		// A layer merges directories, but QEMU ends if it finds modules of another version: this replaces the directory.
		{"--bind", filepath.Join(files, qemuModules), filepath.Join("/usr", qemuModules)},
	} {
		if _, err := h.Run(ctx, append([]string{"mount"}, args...)...); err != nil {
			return fmt.Errorf("QEMU %s: %w", version, err)
		}
	}
	return nil
}

// QEMUVersion asks the VM on this host for its version of QEMU, in the form of QEMUVersions.
func (h *Host) QEMUVersion(ctx context.Context) (string, error) {
	client, err := h.QMP(ctx)
	if err != nil {
		return "", err
	}
	var answer struct {
		QEMU struct {
			Major int `json:"major"`
			Minor int `json:"minor"`
		} `json:"qemu"`
	}
	err = client.Do(ctx, "query-version", nil, &answer)
	return fmt.Sprintf("%d.%d", answer.QEMU.Major, answer.QEMU.Minor), errors.Join(err, client.Disconnect())
}

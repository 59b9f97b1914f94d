// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// A runner starts and stops the QEMUs of machines, as their operators do: the suite itself, or libvirt.
type runner interface {
	// address returns the name of the VM for migrated.
	address(m *machine) string
	// start starts the machine on m.at, and returns when its VM runs.
	start(ctx context.Context, m *machine) error
	// setRunning continues or stops the VM on h. A refusal is no error, because a VM that is on its way may refuse.
	setRunning(ctx context.Context, m *machine, h *lab.Host, run bool) error
	// snapshot gives the first disk of the VM, which runs on h, a new image on top of the present one.
	snapshot(ctx context.Context, m *machine, h *lab.Host, overlay string) error
	// forget returns when libvirt no longer knows a machine whose QEMUs were ended.
	forget(ctx context.Context, m *machine) error
}

// suiteRunner starts QEMU itself and speaks to it by a QMP socket of its own.
type suiteRunner struct{}

func (suiteRunner) address(m *machine) string { return m.path(lab.QMPPath) }

func (suiteRunner) start(ctx context.Context, m *machine) error {
	log, err := os.OpenFile(m.at.Path(filepath.Join(m.dir(), "qemu.log")), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // QEMU has its own
	var argv []string
	for _, arg := range m.config.Args() {
		argv = append(argv, moved(m.name, arg))
	}
	p, err := m.at.Start(log, argv...)
	if err != nil {
		return err
	}
	ended := func() bool {
		select {
		case <-p.Exited():
			return true
		default:
			return false
		}
	}
	if !await(ctx, time.Minute, func() bool { return m.copies.runs(m.at) || ended() }) || ended() {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("VM %s does not start: %s", m.name, said)
	}
	return nil
}

func (suiteRunner) setRunning(ctx context.Context, m *machine, h *lab.Host, run bool) error {
	client := m.copies.client(h)
	if client == nil {
		return errNoQEMU
	}
	command := map[bool]string{true: "cont", false: "stop"}[run]
	var refused *qmp.Error
	var gone *qmp.DisconnectedError
	err := client.Do(ctx, command, nil, nil)
	if err != nil && !errors.As(err, &refused) && !errors.As(err, &gone) {
		return fmt.Errorf("%s VM %s: %w", command, m.name, err)
	}
	return nil
}

func (suiteRunner) snapshot(ctx context.Context, m *machine, h *lab.Host, overlay string) error {
	client := m.copies.client(h)
	if client == nil {
		return errTooLate
	}
	err := client.Do(ctx, "blockdev-snapshot-sync", map[string]string{
		"node-name": "disk0", "snapshot-node-name": "overlay", "snapshot-file": overlay, "format": "qcow2",
	}, nil)
	var refused *qmp.Error
	var gone *qmp.DisconnectedError
	if errors.As(err, &refused) || errors.As(err, &gone) {
		return errTooLate // the disk is inactive at this moment, or no longer this host's
	}
	return err
}

func (suiteRunner) forget(context.Context, *machine) error { return nil }

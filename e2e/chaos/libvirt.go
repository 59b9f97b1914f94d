// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/beevik/etree"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// libvirtRunner is the libvirt of both hosts. Each machine is a transient domain of it with the machine's name.
//
// libvirt holds the only monitor that it knows of. The suite still sees what the machine does by QEMU's own events
// (copies.go): its emulator is a script that gives QEMU a second QMP socket (lab.MakeWatchedEmulator). There the suite
// hears of each time that a VM ran, to the microsecond, whether libvirtd, or a daemon, lives or not. None of that comes
// by libvirt.
type libvirtRunner struct{}

// domainUser is the user as whom libvirt runs QEMU, in Debian's package.
const domainUser = 64055

// virshPatience bounds a command of virsh's. A libvirtd that waits for a QEMU, which waits for a page, does not answer.
const virshPatience = time.Minute

// virsh runs a command of virsh's on a host.
func virsh(ctx context.Context, h *lab.Host, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, virshPatience)
	defer cancel()
	return h.Virsh(ctx, args...)
}

// isRefused reports whether a libvirt that answers refused a command, as it may while a VM is on its way.
func isRefused(err error) bool {
	return err != nil && strings.Contains(err.Error(), "error:") && !strings.Contains(err.Error(), "failed to connect")
}

func (libvirtRunner) address(m *machine) string { return "libvirt:" + m.name }

func (libvirtRunner) start(ctx context.Context, m *machine) error {
	definition, err := domainOf(m)
	if err != nil {
		return err
	}
	for _, h := range m.hosts { // QEMU makes the second socket there
		if err := os.Chown(h.Path(m.dir()), domainUser, domainUser); err != nil {
			return err
		}
	}
	path := filepath.Join(m.dir(), "domain.xml")
	if err := os.WriteFile(m.at.Path(path), []byte(definition), 0o644); err != nil {
		return err
	}
	if _, err := m.at.Virsh(ctx, "create", path); err != nil {
		return err
	}
	if !await(ctx, time.Minute, func() bool { return m.copies.runs(m.at) }) {
		return fmt.Errorf("domain %s does not run", m.name)
	}
	return nil
}

// domainOf returns the definition of the lab's only domain, changed for a machine: its name, its paths, and a log of
// what its guest says.
func domainOf(m *machine) (string, error) {
	text, err := m.config.Domain(lab.WatchedEmulator)
	if err != nil {
		return "", err
	}
	doc := etree.NewDocument()
	if err := doc.ReadFromString(moved(m.name, text)); err != nil {
		return "", err
	}
	name := doc.FindElement("domain/name")
	port := doc.FindElement("domain/devices/serial[@type='unix']/source")
	if name == nil || port == nil {
		return "", errors.New("the lab's domain has no name or no serial port")
	}
	name.SetText(m.name)
	log := etree.NewElement("log")
	log.CreateAttr("file", m.path(lab.SerialLog))
	log.CreateAttr("append", "on")
	port.Parent().InsertChildAt(port.Index()+1, log)
	return doc.WriteToString()
}

func (libvirtRunner) setRunning(ctx context.Context, m *machine, h *lab.Host, run bool) error {
	_, err := virsh(ctx, h, map[bool]string{true: "resume", false: "suspend"}[run], m.name)
	if isRefused(err) {
		return nil
	}
	return err
}

func (libvirtRunner) snapshot(ctx context.Context, m *machine, h *lab.Host, overlay string) error {
	_, err := virsh(ctx, h, "snapshot-create-as", m.name, "--disk-only", "--no-metadata", "--atomic",
		"--diskspec", "vda,snapshot=external,file="+overlay)
	if isRefused(err) {
		return fmt.Errorf("%w: %w", errTooLate, err)
	}
	return err
}

func (libvirtRunner) forget(ctx context.Context, m *machine) error {
	for _, h := range m.hosts {
		if !await(ctx, noticedWithin, func() bool { return domainState(ctx, h, m.name) == "" }) {
			return fmt.Errorf("libvirt of host %s still has domain %s, whose QEMU has ended: %s", h.Name, m.name,
				domainState(ctx, h, m.name))
		}
	}
	return nil
}

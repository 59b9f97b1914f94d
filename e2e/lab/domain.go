// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	_ "embed"
	"encoding/xml"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/template"

	"github.com/migrated-vm/migrated/e2e/guest/card"
	"github.com/migrated-vm/migrated/e2e/image"
)

//go:embed domain.xml
var domainXML string

// domainTemplate makes a domain's definition from a VMConfig.
var domainTemplate = template.Must(template.New("domain.xml").Funcs(template.FuncMap{
	"add":     func(a, b int) int { return a + b },
	"mac":     func(vm, i int) string { return card.MAC(vm, i).String() },
	"letter":  func(i int) string { return string(rune('a' + i)) },
	"escaped": escaped,
}).Parse(domainXML))

func escaped(text string) (string, error) {
	var b strings.Builder
	err := xml.EscapeText(&b, []byte(text))
	return b.String(), err
}

// Domain returns the definition of the VM as a user of libvirt would write it, with free slots for hot-plugged devices.
// Memory can be plugged in if the VM has NUMA nodes, which libvirt requires.
func (c VMConfig) Domain(emulator string) (string, error) {
	var text strings.Builder
	err := domainTemplate.Execute(&text, struct {
		VMConfig
		Name, Emulator, Firmware, Vars, Kernel, Initrd, CommandLine, Console, Serial string

		DiskFiles, Taps   []string
		MiBPerNode, Ports int
	}{
		VMConfig: c, MiBPerNode: c.MemoryMiB / max(1, c.Nodes), Ports: 12, Name: DomainName, Emulator: emulator,
		Firmware: firmwareCode, Vars: firmwareVars, Kernel: kernelPath, Initrd: initrdPath,
		Console: ConsoleLog, Serial: SerialPath,
		CommandLine: strings.Join(slices.Concat([]string{image.CommandLine}, c.deviceParams(), c.KernelArgs), " "),
		DiskFiles:   c.DiskFiles(), Taps: c.taps(),
	})
	return text.String(), err
}

func (c VMConfig) taps() (names []string) {
	for i := range c.NICs {
		names = append(names, c.tap(i))
	}
	return names
}

// DefineDomain defines the VM, with a Linux guest, on the host. It does not start the VM.
func (h *Host) DefineDomain(ctx context.Context, c VMConfig) error {
	return h.virshDomain(ctx, "define", c, emulatorPath)
}

// StartDomain has the host's libvirt start the VM, with a Linux guest, as a transient domain.
func (h *Host) StartDomain(ctx context.Context, c VMConfig) error {
	return h.virshDomain(ctx, "create", c, emulatorPath)
}

func (h *Host) virshDomain(ctx context.Context, command string, c VMConfig, emulator string) error {
	if err := h.lab.Install(ctx, c); err != nil {
		return err
	}
	definition, err := c.Domain(emulator)
	if err != nil {
		return err
	}
	return h.VirshXML(ctx, definition, command)
}

// VirshXML runs a virsh command whose last argument is a file with that XML.
func (h *Host) VirshXML(ctx context.Context, content string, command ...string) error {
	const path = VMDir + "/virsh.xml"
	if err := os.WriteFile(h.Path(path), []byte(content), 0o644); err != nil {
		return err
	}
	if _, err := h.Virsh(ctx, append(command, path)...); err != nil {
		return fmt.Errorf("%w, of\n%s", err, content)
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
	"github.com/migrated-vm/migrated/internal/qemu/cmdline"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const aDefinition = `<domain type="kvm"><name>db-1</name>` +
	`<devices><emulator>/usr/bin/qemu-system-x86_64</emulator></devices></domain>`

// openRefused has a destination start the domain of definition for a VM called db-1, which must be refused before
// libvirt hears of it, and returns why.
func openRefused(t *testing.T, definition string, cfg DestinationConfig) error {
	t.Helper()
	daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db-1", Number: -1, Gone: true, XML: definition})
	cfg.LibvirtSocket, cfg.Log = daemon.Socket, slog.New(slog.DiscardHandler)
	d := destinationOf(&migratedv1.SourceMachine{Name: "db-1", LibvirtDefinition: definition}, cfg)
	d.log = cfg.Log
	err := d.openQEMU(t.Context())
	if called := daemon.Called(); err == nil || len(called) > 0 {
		t.Fatalf("libvirt was asked to %v: %v", called, err)
	}
	return err
}

// TestNoBinariesNoDomain: a host that starts no QEMU does not have libvirt start one either.
func TestNoBinariesNoDomain(t *testing.T) {
	err := openRefused(t, aDefinition, DestinationConfig{})
	if !errors.Is(err, cmdline.ErrNoBinaries) || Remedy(err) == "" {
		t.Errorf("%v; %s", err, Remedy(err))
	}
}

// TestDomainTakesNoNeighboursSocket: libvirt removes what is where a domain is to listen. No domain is started where
// another process listens, or where that is a file.
func TestDomainTakesNoNeighboursSocket(t *testing.T) {
	dir := t.TempDir()
	used, file, old := dir+"/used", dir+"/file", dir+"/old"
	listener, err := net.Listen("unix", used)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: old, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	if err := errors.Join(left.Close(), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for format, where := range map[string]string{
		"a channel": `<channel type="unix"><source mode="bind" path=%q/></channel>`,
		"a screen":  `<graphics type="vnc" socket=%q/>`,
		"a listen":  `<graphics type="spice"><listen type="socket" socket=%q/></graphics>`,
		"a client":  `<channel type="unix"><source mode="connect" path=%q/></channel>`,
	} {
		for path, want := range map[string]string{
			used: "another process listens at " + used, file: file + ", where the destination's QEMU is to listen, is no socket",
			old: "", dir + "/none": "",
		} {
			device := fmt.Sprintf(where, path)
			err := checkSockets(strings.Replace(aDefinition, "</devices>", device+"</devices>", 1))
			if format == "a client" || want == "" {
				if err != nil {
					t.Errorf("%s at %s: %v", format, path, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s at %s: %v, want %q", format, path, err, want)
			}
		}
	}
}

// TestDomainOfAnotherName: peers says which VMs a source may send, by their names. The definition names that VM.
func TestDomainOfAnotherName(t *testing.T) {
	for name, definition := range map[string]string{
		"another":      strings.Replace(aDefinition, "db-1", "web-1", 1),
		"behind a lie": strings.Replace(aDefinition, "<name>", `<x:name xmlns:x="urn:x">db-1</x:name><name>`, 1),
	} {
		err := openRefused(t, definition, DestinationConfig{Binaries: []string{"qemu-system-*"}, MinUID: 1})
		if !strings.Contains(err.Error(), "the destination starts no such domain") || Remedy(err) == "" {
			t.Errorf("%s: %v; %s", name, err, Remedy(err))
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/lab"
)

// A form is a way to run the demo's VM: by QEMU alone, or by libvirt.
type form struct {
	vm     string // its name for migrated
	events string // the path of its second QMP socket, by which the demo measures times
	// stage gives a host what it needs, and returns the arguments of its daemon.
	stage func(ctx context.Context, h *lab.Host, log io.Writer) ([]string, error)
	// boot starts the VM.
	boot func(ctx context.Context, h *lab.Host, vm lab.VMConfig, guest *report.Log) (*report.Port, error)
	// show prints what the VM's users see of it on a host.
	show func(ctx context.Context, h *lab.Host) error
}

// plain is a QEMU without libvirt.
var plain = form{
	vm: lab.QMPPath, events: lab.EventsPath,
	stage: func(context.Context, *lab.Host, io.Writer) ([]string, error) { return nil, nil },
	boot: func(ctx context.Context, h *lab.Host, vm lab.VMConfig, guest *report.Log) (*report.Port, error) {
		vm.Extra = lab.EventsArgs()
		return h.Boot(ctx, vm, guest)
	},
	show: func(context.Context, *lab.Host) error { return nil },
}

// domain is a domain of libvirt's.
var domain = form{
	vm: lab.DomainVM, events: lab.DomainEventsPath,
	stage: func(ctx context.Context, h *lab.Host, log io.Writer) ([]string, error) {
		say("Starting libvirtd on host %s", h.Name)
		if err := h.MakeWatchedEmulator(); err != nil {
			return nil, err
		}
		_, err := h.StartLibvirt(ctx, log)
		return []string{"--qemu-binaries", lab.WatchedEmulator}, err
	},
	boot: func(ctx context.Context, h *lab.Host, vm lab.VMConfig, guest *report.Log) (*report.Port, error) {
		if err := h.StartWatchedDomain(ctx, vm); err != nil {
			return nil, err
		}
		return h.Guest(ctx, guest)
	},
	show: func(ctx context.Context, h *lab.Host) error {
		list, err := h.Run(ctx, "virsh", "list", "--all")
		if err == nil {
			_, err = fmt.Fprintf(os.Stdout, "virsh list --all, on host %s:\n%s", h.Name, list)
		}
		return err
	},
}

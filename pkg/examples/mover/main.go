// SPDX-License-Identifier: Apache-2.0

// Program mover moves a virtual machine of this host and prints the progress. It uses the control API of the host's
// daemon.
//
//	mover CONTROL-SOCKET ID VM DESTINATION    (say, /run/migrated/migrated.sock move-1 libvirt:db host-b:7600)
//
// ID names the migration. If mover was interrupted, start it again with the same ID: it follows the same migration.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: mover CONTROL-SOCKET ID VM DESTINATION")
		os.Exit(2)
	}
	if err := move(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, "mover:", err)
		os.Exit(1)
	}
}

// move moves the VM and returns when all of its memory is at the destination.
func move(socket, id, vm, destination string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	c, err := client.Dial("unix://"+socket, client.Options{})
	if err != nil {
		return err
	}
	defer c.Close()
	spec := &migratedv1.MigrationSpec{Vm: vm, Destination: destination}
	m, err := c.Migrate(ctx, id, spec, func(m *migratedv1.Migration) {
		fmt.Println(m.GetId(), m.GetState())
	})
	if err != nil {
		return err
	}
	fmt.Println("the VM stood still for", m.GetProgress().GetDowntime().AsDuration())
	return nil
}

// SPDX-License-Identifier: Apache-2.0

package client_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/pkg/client"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// exampleDaemon starts the fake daemon d at a socket, for the examples. A program has a real daemon there.
func exampleDaemon(d *daemon) (socket string, stop func()) {
	dir, err := os.MkdirTemp("", "migrated-example-")
	if err != nil {
		panic(err)
	}
	t := &exampleTB{}
	socket = filepath.Join(dir, "control.sock")
	end := d.start(t, socket)
	return socket, func() {
		end()
		_ = os.RemoveAll(dir)
	}
}

// exampleTB has the methods of testing.TB that start uses.
type exampleTB struct{ testing.TB }

func (*exampleTB) Helper()           {}
func (*exampleTB) Cleanup(func())    {}
func (*exampleTB) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

func ExampleClient_Migrate() {
	socket, stop := exampleDaemon(&daemon{watch: func(_ int, id string, send func(*migratedv1.Migration) error) error {
		return errors.Join(send(at(id, active)), send(at(id, completed)))
	}})
	defer stop()

	c, err := client.Dial("unix://"+socket, client.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()

	// If this program is started again, the same call waits for the same migration.
	spec := &migratedv1.MigrationSpec{
		Vm: "libvirt:db", Destination: "host-b:7600", Labels: map[string]string{"team": "db"},
	}
	m, err := c.Migrate(context.Background(), "db-1", spec, func(m *migratedv1.Migration) {
		fmt.Println(m.GetState())
	})
	var told *client.Error
	switch {
	case errors.Is(err, client.ErrRefused), errors.Is(err, client.ErrFailed):
		errors.As(err, &told)
		fmt.Println(told.Message, told.VMStatus, told.Remedy)
	case err != nil:
		fmt.Println(err)
	default:
		fmt.Println(m.GetId(), "is over")
	}
	// Output:
	// MIGRATION_STATE_POSTCOPY_ACTIVE
	// MIGRATION_STATE_COMPLETED
	// db-1 is over
}

func ExampleFollower() {
	socket, stop := exampleDaemon(&daemon{
		lists: [][]*migratedv1.Migration{{at("db-1", active)}},
		follows: []func(string, events) error{
			func(_ string, stream events) error {
				err := send(stream, "v", event(changed, at("db-1", completed)), event(removed, at("db-1", completed)))
				<-stream.Context().Done()
				return err
			},
		},
	})
	defer stop()

	c, err := client.Dial(socket, client.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()

	ctx, cancel := context.WithCancel(context.Background())
	f := client.NewFollower(c, &migratedv1.MigrationFilter{Labels: map[string]string{"team": "db"}}, client.Handlers{
		Added: func(m *migratedv1.Migration) { fmt.Println("added", m.GetId()) },
		Changed: func(before, after *migratedv1.Migration) {
			if client.Over(after.GetState()) && !client.Over(before.GetState()) {
				fmt.Println("over", after.GetId(), client.Outcome(after))
			}
		},
		Removed: func(m *migratedv1.Migration) {
			fmt.Println("removed", m.GetId())
			cancel()
		},
		Synced: func() { fmt.Println("this is all") },
	})
	fmt.Println(f.Run(ctx))
	// Output:
	// added db-1
	// this is all
	// over db-1 <nil>
	// removed db-1
	// context canceled
}

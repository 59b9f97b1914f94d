// SPDX-License-Identifier: Apache-2.0

package pagelane_test

import (
	"context"
	"fmt"
	"net"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
)

// serve serves the memory in a file, and returns its address, until stop is called.
func serve(path string, size uint64) (address string, stop func(), err error) {
	ram, err := pagesrv.OpenRAM([]pagesrv.Block{{ID: "memory", Path: path, Size: size, PageSize: 4096}})
	if err != nil {
		return "", nil, err
	}
	pages := pagesrv.NewServer(pagesrv.Options{})
	// Nobody writes to the file. For a VM, this function would check that the VM is stopped.
	export, err := pages.Offer("a-move", "a-secret", ram, func(context.Context) error { return nil })
	if err != nil {
		return "", nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	lanes := pagelane.NewServer(func(lane *pagelane.Stream) error { return pages.ServeLane(lane) }, nil)
	server := grpc.NewServer(append(pagewire.ServerOptions(), grpc.Creds(lanes.Credentials(insecure.NewCredentials())))...)
	go func() { _ = server.Serve(listener) }() // until Stop
	return listener.Addr().String(), func() {
		export.Withdraw()
		server.Stop()
		lanes.Close()
		_ = ram.Close()
	}, nil
}

// fetch asks for one page.
func fetch(ctx context.Context, address string, offset uint64) (string, error) {
	conn, err := pagelane.Dial(ctx, address, insecure.NewCredentials(), nil)
	if err != nil {
		return "", err
	}
	lane, err := pagelane.Open(ctx, conn, pagewire.Call{ID: "a-move", Token: "a-secret"}.Metadata())
	if err != nil {
		return "", err
	}
	defer lane.Abort()
	if err := lane.Send(&pagewire.Request{Ranges: []pagewire.Range{{Offset: offset, Length: 4096}}}); err != nil {
		return "", err
	}
	var reply pagewire.Reply
	defer reply.Release()
	if err := lane.Recv(&reply); err != nil {
		return "", err
	}
	if reply.Runs[0].Zero {
		return "zeros", nil
	}
	return string(reply.Data[:5]), nil
}

// A source serves memory, and a destination fetches pages of it.
func Example() {
	file, err := os.CreateTemp("", "memory")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.Remove(file.Name())
	if _, err := file.WriteAt([]byte("hello"), 4096); err != nil {
		fmt.Println(err)
		return
	}
	if err := file.Truncate(3 * 4096); err != nil {
		fmt.Println(err)
		return
	}
	address, stop, err := serve(file.Name(), 3*4096)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stop()
	fmt.Println(fetch(context.Background(), address, 4096))
	fmt.Println(fetch(context.Background(), address, 8192))
	// Output:
	// hello <nil>
	// zeros <nil>
}

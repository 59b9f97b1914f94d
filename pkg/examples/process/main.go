// SPDX-License-Identifier: Apache-2.0

// Program process shows post-copy without a virtual machine: a process runs while the content of its memory comes from
// another host.
//
//	process source ADDRESS FILE     serves the memory that is in FILE
//	process destination ADDRESS N   starts a process that hands its memory over, and fills it from ADDRESS
//	process run SOCKET N            is that process, with N bytes of memory
//
// There is no encryption, and the token is no secret: see package mtls.
package main

import (
	"context"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/handover"
)

// Both sides use the same id, token and page size.
const (
	id, token = "a-move", "a-secret"
	page      = 4096
)

func main() {
	var err error
	switch {
	case len(os.Args) == 4 && os.Args[1] == "source":
		err = source(os.Args[2], os.Args[3])
	case len(os.Args) == 4 && os.Args[1] == "destination":
		err = destination(os.Args[2], os.Args[3])
	case len(os.Args) == 4 && os.Args[1] == "run":
		err = run(os.Args[2], os.Args[3])
	default:
		err = fmt.Errorf("usage: process source ADDRESS FILE | destination ADDRESS N | run SOCKET N")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "process:", err)
		os.Exit(1)
	}
}

// source serves the memory in a file until it is killed.
func source(address, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	ram, err := pagesrv.OpenRAM([]pagesrv.Block{{ID: "memory", Size: uint64(info.Size()), PageSize: page, Path: path}})
	if err != nil {
		return err
	}
	defer ram.Close()
	pages := pagesrv.NewServer(pagesrv.Options{})
	stopped := func(context.Context) error { return nil } // nobody changes the file
	if _, err := pages.Offer(id, token, ram, stopped); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	lanes := pagelane.NewServer(func(lane *pagelane.Stream) error { return pages.ServeLane(lane) }, nil)
	server := grpc.NewServer(append(pagewire.ServerOptions(), grpc.Creds(lanes.Credentials(insecure.NewCredentials())))...)
	fmt.Println(listener.Addr())
	return server.Serve(listener)
}

// destination starts a process and fills its memory from the source at address.
func destination(address, bytes string) error {
	dir, err := os.MkdirTemp("", "process-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "socket")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	defer listener.Close()
	child := exec.Command(os.Args[0], "run", socket, bytes)
	child.Stdout, child.Stderr = os.Stdout, os.Stderr
	if err := child.Start(); err != nil {
		return err
	}
	if err := fill(listener, address); err != nil {
		_ = child.Process.Kill() // its memory will never be complete
		_ = child.Wait()
		return err
	}
	return child.Wait()
}

// fill fills the memory of the process that connects. Pages that the process touches come first; the sweep fetches all
// others.
func fill(listener *net.UnixListener, address string) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	conn, err := listener.AcceptUnix()
	if err != nil {
		return err
	}
	defer conn.Close()
	taken, err := handover.Receive(ctx, conn, handover.PeerPolicy{UIDs: []uint32{uint32(os.Geteuid())}})
	if err != nil {
		return err
	}
	defer taken.UFFD.Close()
	m := taken.Mappings[0]
	engine, err := postcopy.New(postcopy.Options{Workers: 1, Blocks: []postcopy.Block{{
		ID: "memory", Addr: m.BaseHostVirtAddr, Size: m.Size, PageSize: m.PageSize, UFFD: taken.UFFD, Private: true,
	}}})
	if err != nil {
		return err
	}
	engine.StartSweep()
	demand, err := lane(ctx, address, false)
	if err != nil {
		return err
	}
	bulk, err := lane(ctx, address, true)
	if err != nil {
		return err
	}
	return engine.Run(ctx, []postcopy.Lane{demand}, bulk, nil)
}

// lane opens a demand lane or a bulk lane to the source.
func lane(ctx context.Context, address string, bulk bool) (*pagelane.Client, error) {
	conn, err := pagelane.Dial(ctx, address, insecure.NewCredentials(), nil)
	if err != nil {
		return nil, err
	}
	return pagelane.Open(ctx, conn, pagewire.Call{ID: id, Token: token, Bulk: bulk, Packed: true}.Metadata())
}

// run is the process. It maps that many bytes of memory, hands its userfaultfd over while all pages are missing, and
// reads all of the memory.
func run(socket, bytes string) error {
	size, err := strconv.Atoi(bytes)
	if err != nil {
		return err
	}
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	// A forked process must not have this memory: nobody fills its missing pages, and they read as zeros.
	if err := unix.Madvise(memory, unix.MADV_DONTFORK); err != nil {
		return err
	}
	u, err := uffd.Open(uffd.OpenOptions{NonBlocking: true})
	if err != nil {
		return err
	}
	// Without these events, memory that this process gives up would get its old content.
	const events = uffd.FeatureEventRemove | uffd.FeatureEventUnmap | uffd.FeatureEventRemap | uffd.FeatureThreadID
	if _, _, err := u.API(events); err != nil {
		return err
	}
	m := handover.Mapping{
		BaseHostVirtAddr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))), Size: uint64(size), PageSize: page,
	}
	if _, err := u.Register(m.Range(), uffd.ModeMissing); err != nil {
		return err
	}
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := handover.Send(context.Background(), conn, []handover.Mapping{m}, u); err != nil {
		return err
	}
	fmt.Printf("%08x\n", crc32.ChecksumIEEE(memory)) // waits for each page that is missing
	return u.Close()
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/internal/pagelane"
	"github.com/migrated-vm/migrated/internal/pagewire"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	pageSize = 4096
	token    = "secret"
	// mostUFFDs bounds into how many blocks the same RAM is offered, each time under that number as the migration's id.
	mostUFFDs = 8
)

// ram is the memory of a stopped VM: a sparse file in memory of which some pages have data.
type ram struct {
	file   *os.File
	server *pagesrv.Server
}

// openRAM makes RAM of size pages, of which so many have data, evenly spread, and offers it in 1, 2, 4 and 8 blocks.
func openRAM(size, pages uint64) (*ram, error) {
	fd, err := unix.MemfdCreate("floor-source", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	r := &ram{file: os.NewFile(uintptr(fd), "floor-source"), server: pagesrv.NewServer()}
	if err := r.file.Truncate(int64(size * pageSize)); err != nil {
		return nil, err
	}
	page := bytes.Repeat([]byte{0xA5}, pageSize)
	for p := range pages {
		if _, err := r.file.WriteAt(page, int64(p*(size/pages)*pageSize)); err != nil {
			return nil, err
		}
	}
	for n := uint64(1); n <= mostUFFDs && size%n == 0; n *= 2 {
		var blocks []pagesrv.Block
		for i := range n {
			blocks = append(blocks, pagesrv.Block{
				ID: fmt.Sprint("ram", i), Path: fmt.Sprintf("/proc/self/fd/%d", r.file.Fd()),
				Offset: int64(size / n * i * pageSize), Size: size / n * pageSize, PageSize: pageSize,
			})
		}
		opened, err := pagesrv.OpenRAM(blocks)
		if err != nil {
			return nil, err
		}
		stopped := func(context.Context) error { return nil } // there is no VM that could run
		if _, err := r.server.Offer(strconv.FormatUint(n, 10), token, opened, stopped); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// serve answers lanes that come through the listener until stop.
func (r *ram) serve(listener net.Listener) (stop func()) {
	lanes := pagelane.NewServer(func(s *pagelane.Stream) error { return r.server.ServeLane(s) })
	server := grpc.NewServer(append(pagewire.ServerOptions(), grpc.Creds(lanes.Credentials(insecure.NewCredentials())))...)
	migratedv1.RegisterPageServiceServer(server, r.server)
	go func() { _ = server.Serve(listener) }()
	return func() {
		server.Stop()
		lanes.Close()
	}
}

// source is the process of the source host. It prints where it listens, with gRPC and with nothing but TCP.
func source(_ context.Context, j job) error {
	r, err := openRAM(j.Size, j.Pages)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer r.serve(listener)()
	go r.servePlain(plain)
	fmt.Printf("%s,%s\n", listener.Addr(), plain.Addr())
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	rss, err := peakRSS()
	if err == nil {
		fmt.Println(rss)
	}
	return err
}

// askBytes is the length of a request without gRPC: an offset, and room for as much again.
const askBytes = 16

// servePlain does for a page what the page server does, without messages, runs and gRPC: what is left is Go's net
// package.
func (r *ram) servePlain(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			ask, page := make([]byte, askBytes), make([]byte, pageSize)
			for {
				if _, err := io.ReadFull(conn, ask); err != nil {
					return
				}
				if _, err := r.file.ReadAt(page, offsetOf(ask)); err != nil {
					return
				}
				if _, err := conn.Write(page); err != nil {
					return
				}
			}
		}()
	}
}

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
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/migrated-vm/migrated/internal/gomaxprocs"
	"github.com/migrated-vm/migrated/internal/pki"
	"github.com/migrated-vm/migrated/pkg/pagelane"
	"github.com/migrated-vm/migrated/pkg/pagesrv"
	"github.com/migrated-vm/migrated/pkg/pagewire"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	pageSize = 4096
	token    = "secret"
	// mostUFFDs bounds into how many blocks the RAM is split. It is offered for each number of blocks, under that number
	// as the migration's ID.
	mostUFFDs = 16
)

// ram is the memory of a stopped VM: a sparse file in memory. Some of its pages have data.
type ram struct {
	file   *os.File
	server *pagesrv.Server
}

// openRAM makes RAM of size pages and offers it in 1, 2, 4, 8 and 16 blocks. pages of them have data, evenly spread.
func openRAM(size, pages uint64) (*ram, error) {
	fd, err := unix.MemfdCreate("floor-source", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	r := &ram{file: os.NewFile(uintptr(fd), "floor-source"), server: pagesrv.NewServer(pagesrv.Options{})}
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
func (r *ram) serve(listener net.Listener, creds credentials.TransportCredentials) (stop func()) {
	lanes := pagelane.NewServer(func(s *pagelane.Stream) error { return r.server.ServeLane(s) }, gomaxprocs.Add)
	server := grpc.NewServer(append(pagewire.ServerOptions(), grpc.Creds(lanes.Credentials(creds)))...)
	migratedv1.RegisterPageServiceServer(server, r.server)
	go func() { _ = server.Serve(listener) }()
	return func() {
		server.Stop()
		lanes.Close()
	}
}

// source runs the role of the source host's process. It prints its addresses: with gRPC, with nothing but TCP and, if
// the job has a certificate, with gRPC and mutual TLS.
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
	defer r.serve(listener, insecure.NewCredentials())()
	go r.servePlain(plain)
	secure := ""
	if j.TLS != "" {
		encrypted, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer r.serve(encrypted, pki.FilesIn(j.TLS).Server())()
		secure = encrypted.Addr().String()
	}
	fmt.Printf("%s,%s,%s\n", listener.Addr(), plain.Addr(), secure)
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return err
	}
	rss, err := peakRSS()
	if err == nil {
		fmt.Println(rss)
	}
	return err
}

// askBytes is the length of a request without gRPC: an offset, and eight bytes that are not used.
const askBytes = 16

// servePlain serves pages as the page server does, but without messages, runs and gRPC: only Go's net package is left.
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

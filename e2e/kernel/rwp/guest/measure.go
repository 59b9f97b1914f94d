// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/ram"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

const (
	ramMiB   = 256
	pageSize = 4096
	ramPages = ramMiB << 20 / pageSize

	touched = 4096 // pages that are touched in an interval
	rounds  = 7    // the fastest counts

	startPatience = 2 * time.Minute // emulated, and on a busy machine
)

// memories are the two kinds of RAM, as options of QEMU's -object.
var memories = []struct{ name, object string }{
	{"private", "memory-backend-ram"},
	{"shared", "memory-backend-memfd,share=on"},
}

// measure reports times per page, in nanoseconds, of a stopped QEMU whose RAM is all there, in pages of 4 KiB.
func measure(ctx context.Context) error {
	for _, m := range memories {
		if err := measureMemory(ctx, m.name, m.object); err != nil {
			return fmt.Errorf("%s memory: %w", m.name, err)
		}
	}
	return nil
}

func measureMemory(ctx context.Context, name, object string) (err error) {
	b, err := start(ctx, name, object)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	present := uffd.PageQuery{All: uffd.PagePresent, Return: uffd.PagePresent}
	if err := b.scans("present", present, all); err != nil {
		return err
	}
	// Tracking of writes, since Linux 6.7.
	err = b.ifSupported(b.written, uffd.HaveFeatures(uffd.FeatureWPAsync), uffd.HaveCategories(uffd.PageWritten))
	if err != nil {
		return err
	}
	// Tracking of any access, since 7.3.
	return b.ifSupported(b.accessed, uffd.HaveFeatures(uffd.FeatureRWPAsync), uffd.HaveCategories(uffd.PageAccessed))
}

// ifSupported runs f, or logs what the kernel lacks for it.
func (b *bench) ifSupported(f func() error, have ...error) error {
	err := errors.Join(have...)
	if errors.Is(err, uffd.ErrNotSupported) {
		fmt.Println("LOG", b.name, err)
		return nil
	}
	if err != nil {
		return err
	}
	return f()
}

// A bench is a QEMU and the descriptors for looking at its RAM.
type bench struct {
	name    string
	process *exec.Cmd
	vm      *qemu.VM
	u       *uffd.UFFD
	pagemap *uffd.Pagemap
	ram     uffd.Range
	regions []uffd.PageRegion
}

func start(ctx context.Context, name, object string) (_ *bench, err error) {
	dir, err := os.MkdirTemp("", "rwp")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "qmp")
	b := &bench{name: name, regions: make([]uffd.PageRegion, ramPages)}
	b.process = exec.Command("qemu-system-x86_64", "-M", "q35,memory-backend=ram0", "-accel", "tcg",
		"-m", strconv.Itoa(ramMiB), "-object", object+",id=ram0,prealloc=on,size="+strconv.Itoa(ramMiB)+"M",
		"-S", "-nodefaults", "-display", "none", "-qmp", "unix:"+socket+",server=on,wait=off")
	b.process.Stdout, b.process.Stderr = os.Stdout, os.Stderr
	// Pages are 4 KiB even if QEMU asks for huge ones: by prctl(2) a program that is started inherits the setting.
	if err := unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("prctl(PR_SET_THP_DISABLE): %w", err)
	}
	if err := b.process.Start(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	starting, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	for b.vm == nil {
		if b.vm, err = qemu.Attach(starting, socket); err != nil {
			if starting.Err() != nil {
				return nil, fmt.Errorf("start QEMU: %w", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	blocks, err := b.vm.RAM.Blocks(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(blocks, ram.Block.IsBackend)
	if i < 0 || blocks[i].Size != ramMiB<<20 {
		return nil, fmt.Errorf("no RAM of %d MiB among %+v", ramMiB, blocks)
	}
	b.ram = uffd.Range{Start: blocks[i].Addr, Len: blocks[i].Size}
	b.pagemap, err = uffd.OpenPagemap(b.vm.Pid)
	return b, err
}

func (b *bench) close() (err error) {
	if b.pagemap != nil {
		err = b.pagemap.Close()
	}
	if b.vm != nil {
		err = errors.Join(err, b.vm.Close())
	}
	err = errors.Join(err, b.process.Process.Kill())
	_ = b.process.Wait() // it was killed
	return err
}

// supervise gives the bench a new userfaultfd of QEMU's, for all of its RAM.
func (b *bench) supervise(features uffd.Features, mode uffd.RegisterMode) (end func() error, err error) {
	taken, err := inject.Take(context.Background(), b.vm.Pid, inject.TakeOptions{})
	if err != nil {
		return nil, err
	}
	b.u = taken.UFFD
	if _, _, err := b.u.API(features); err != nil {
		return nil, err
	}
	if _, err := b.u.Register(b.ram, mode); err != nil {
		return nil, err
	}
	return func() error {
		return errors.Join(b.u.Unregister(b.ram), taken.CloseRemote(context.Background()), b.u.Close())
	}, nil
}

// written measures the cost of FeatureWPAsync, where only writes count.
func (b *bench) written() error {
	end, err := b.supervise(uffd.FeatureWPAsync, uffd.ModeWP)
	if err != nil {
		return err
	}
	query := uffd.PageQuery{All: uffd.PageWritten, Return: uffd.PageWritten}
	protect := func() error { return b.u.WriteProtect(b.ram, uffd.WPProtect) }
	release := func() error { return b.u.WriteProtect(b.ram, 0) }
	err = b.intervals("written", query, protect, release, true)
	return errors.Join(err, end())
}

// accessed measures the cost of FeatureRWPAsync.
func (b *bench) accessed() error {
	end, err := b.supervise(uffd.FeatureRWP|uffd.FeatureRWPAsync, uffd.ModeRWP)
	if err != nil {
		return err
	}
	query := uffd.PageQuery{All: uffd.PageAccessed, Return: uffd.PageAccessed}
	protect := func() error { return b.u.RWProtect(b.ram, uffd.RWPProtect) }
	release := func() error { return b.u.RWProtect(b.ram, 0) }
	err = b.intervals("accessed", query, protect, release, false)
	return errors.Join(err, end())
}

// intervals measures each operation of an interval, for each set of pages that may be touched in it. The scan must name
// exactly these pages.
func (b *bench) intervals(name string, query uffd.PageQuery, protect, release func() error, write bool) error {
	err := b.report(name+"-protect", ramPages, release, protect)
	if err == nil {
		err = b.report(name+"-protect-again", ramPages, protect, protect)
	}
	if err == nil {
		err = b.scans(name+"-none", query, nil)
	}
	for _, s := range []struct {
		name  string
		pages pageSet
	}{{"run", run4096}, {"apart", apart}} {
		touch := func() error { return b.touch(s.pages, write) }
		if err == nil {
			err = b.report(name+"-touch-"+s.name, touched, protect, touch)
		}
		if err == nil {
			err = b.scans(name+"-"+s.name, query, s.pages)
		}
		if err == nil {
			// The first touch after the release may still fault, so the next one is measured.
			free := func() error { return errors.Join(release(), touch()) }
			err = b.report(name+"-touch-"+s.name+"-free", touched, free, touch)
		}
	}
	return err
}

// A pageSet reports whether a page of RAM is in the set. nil is the empty set.
type pageSet func(page uint64) bool

func all(uint64) bool { return true }

// run4096 is as many adjacent pages as touched says. apart is as many pages that are not adjacent, so that each is a
// region for the scan.
func run4096(page uint64) bool { return page < touched }
func apart(page uint64) bool   { return page%(ramPages/touched) == 0 }

// scans reports the cost of a scan of all RAM, per page of RAM. The scan must find exactly the pages of want.
func (b *bench) scans(name string, query uffd.PageQuery, want pageSet) error {
	found := 0
	err := b.report(name+"-scan", ramPages, func() error { return nil }, func() error {
		n, rest, err := b.pagemap.Scan(b.ram, query, b.regions)
		if err == nil && rest.Len != 0 {
			err = errors.New("there was no room for what the scan found")
		}
		found = n
		return err
	})
	if err != nil {
		return err
	}
	regions := b.regions[:found]
	for page := range uint64(ramPages) {
		at := b.ram.Start + page*pageSize
		for len(regions) > 0 && regions[0].End <= at {
			regions = regions[1:]
		}
		in := len(regions) > 0 && regions[0].Start <= at
		if wanted := want != nil && want(page); in != wanted {
			return fmt.Errorf("%s-scan: page %d found: %t, want %t", name, page, in, wanted)
		}
	}
	return nil
}

// touch makes the kernel read or write a byte of each page of the set in QEMU's memory, as KVM does for a virtual CPU.
// It writes what was there: zeros.
func (b *bench) touch(pages pageSet, write bool) error {
	const most = 1024 // IOV_MAX
	remote := make([]unix.RemoteIovec, 0, most)
	local := make([]byte, most)
	access := func() error {
		iov := []unix.Iovec{{Base: &local[0], Len: uint64(len(remote))}}
		call := unix.ProcessVMReadv
		if write {
			call = unix.ProcessVMWritev
		}
		n, err := call(b.vm.Pid, iov, remote, 0)
		if err == nil && n != len(remote) {
			err = fmt.Errorf("%d of %d bytes", n, len(remote))
		}
		remote = remote[:0]
		return err
	}
	for page := range uint64(ramPages) {
		if !pages(page) {
			continue
		}
		remote = append(remote, unix.RemoteIovec{Base: uintptr(b.ram.Start + page*pageSize), Len: 1})
		if len(remote) == most {
			if err := access(); err != nil {
				return err
			}
		}
	}
	if len(remote) > 0 {
		return access()
	}
	return nil
}

// report prints the time of op per page, in the fastest of some rounds. Each round calls prepare first.
func (b *bench) report(name string, pages int, prepare, op func() error) error {
	fastest := time.Duration(math.MaxInt64)
	for range rounds {
		if err := prepare(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		begin := time.Now()
		if err := op(); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fastest = min(fastest, time.Since(begin))
	}
	fmt.Printf("RESULT %s-%s %.2f\n", b.name, name, float64(fastest)/float64(pages))
	return nil
}

// SPDX-License-Identifier: Apache-2.0

package migration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/migrated-vm/migrated/internal/qemu"
	"github.com/migrated-vm/migrated/internal/qemu/process"
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	keptFacts  = "migration.json"
	keptStates = "pages"
)

// keptFiles holds the files of a migration to this host that outlive the daemon. One file has facts and is written
// once, before the device state comes. The other is mapped: it changes while the VM is stopped and later, for the
// cost of a store in memory. Both describe memory of this host and are worthless after a reboot.
type keptFiles struct {
	dir     string
	mapping []byte      // keptHeader, then the states of all pages; nil: closed
	last    *keptHeader // a copy of the header after close
}

// keptFactsV1 is the content of keptFacts.
type keptFactsV1 struct {
	Version  uint32           `json:"version"`
	Request  json.RawMessage  `json:"request"` // a PrepareIncomingRequest
	QEMU     process.Identity `json:"qemu"`
	QMP      string           `json:"qmp"`
	RemoteFD int              `json:"remote_fd"` // of the userfaultfd, in QEMU
	Blocks   []keptBlock      `json:"ram_blocks"`
	Discards bool             `json:"discards"` // true: for older daemons, whose engine had to be told of a balloon
	Settings *qemu.Settings   `json:"settings"` // to be put back in QEMU

	// Created is when the migration came here. Older daemons did not write it.
	Created time.Time `json:"created,omitzero"`

	// Shown in the API. How the descriptor was made cannot be read from it later.
	Supervision uffd.Supervision `json:"supervision"`
	Label       string           `json:"label"`
}

// keptBlock is a RAM block. Blocks have the order of the request.
type keptBlock struct {
	ID       string `json:"id"`
	Addr     uint64 `json:"addr"` // in QEMU
	Size     uint64 `json:"size"`
	PageSize uint64 `json:"page_size"`
	// Populated: all of the block is to be present in the end, see postcopy.Block.
	Populated bool `json:"populated,omitempty"`
	// Private: only QEMU has the memory, see postcopy.Block. It is not set in files of older daemons, which reported
	// no lost pages.
	Private bool `json:"private,omitempty"`
}

// keptHeader begins the mapped file. Times are in nanoseconds.
type keptHeader struct {
	magic uint64 // keptMagic, and the version in its lower half
	// loaded is set when QEMU has the whole device state.
	loaded atomic.Uint64
	// toldToRun is set before QEMU is told to run the VM. While it is 0, the VM has not run here.
	toldToRun atomic.Uint64
	// resumed is when the VM started to run, in Unix time; 0: not yet.
	resumed    atomic.Int64
	resumeTime atomic.Int64
	downtime   atomic.Int64
	// filled is set when all memory is here, before QEMU's descriptor is closed.
	filled atomic.Uint64
	// bandwidth is the limit that the source asked for last, in bytes a second. 0: no limit, or an older daemon wrote
	// the file.
	bandwidth atomic.Uint64
	// closed is set when QEMU needs nothing of a daemon any more. The files then only say how the migration ended.
	closed atomic.Uint64
	// ended is the Reason of a VM that ended by itself; 0: it has not ended.
	ended atomic.Uint64
	// paused is set if the VM was moved paused and was not run here.
	paused atomic.Uint64
	// started is when the switch began; over, when the migration ended; due, when all memory has to be here. Unix
	// time. 0: unknown, or an older daemon wrote the file.
	started, over, due atomic.Int64
	// serveTime is how long Run took; 0: unknown, or an older daemon wrote the file.
	serveTime atomic.Int64
	// defined is set when this host's libvirt keeps the domain's definition, as the source asked for.
	defined atomic.Uint64
}

const (
	keptMagic      = 0x6d696772_00000000
	keptHeaderSize = 4096
	// keptCopies is where in the header the kernel stores the results of the engine's copies. Older daemons leave
	// zeros there, which the engine takes for no result.
	keptCopies = 1024
)

// engineBlocks returns the blocks for the engine.
func (f *keptFactsV1) engineBlocks(u *uffd.UFFD) []postcopy.Block {
	blocks := make([]postcopy.Block, 0, len(f.Blocks))
	for _, b := range f.Blocks {
		blocks = append(blocks, postcopy.Block{
			ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize, UFFD: u, Populated: b.Populated,
			Private: b.Private,
		})
	}
	return blocks
}

// createKept creates the files of a new migration.
func createKept(dir string, facts *keptFactsV1, request *migratedv1.PrepareIncomingRequest) (*keptFiles, error) {
	k := &keptFiles{dir: dir}
	if _, err := os.Lstat(filepath.Join(dir, keptFacts)); err == nil {
		return nil, withRemedy(fmt.Errorf("%s holds a migration with the same id that has not ended", dir),
			"restart the daemon, which takes it up, or choose another id")
	}
	if err := k.create(facts, request); err != nil {
		return nil, fmt.Errorf("keep what a restarted daemon needs of the migration: %w", errors.Join(err, k.remove()))
	}
	return k, nil
}

func (k *keptFiles) create(facts *keptFactsV1, request *migratedv1.PrepareIncomingRequest) error {
	size := keptHeaderSize + postcopy.StateSize(facts.engineBlocks(nil))
	f, err := os.OpenFile(filepath.Join(k.dir, keptStates), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() // the mapping remains
	// A full file system fails here, and not later by a SIGBUS in the middle of a fault.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(size)); err != nil {
		return fmt.Errorf("%d bytes in %s: %w", size, f.Name(), err)
	}
	if err := k.mapFile(f, size); err != nil {
		return err
	}
	k.header().magic = keptMagic | version.State
	facts.Version = version.State
	if facts.Request, err = protojson.Marshal(request); err != nil {
		return err
	}
	return writeJSON(filepath.Join(k.dir, keptFacts), facts)
}

func (k *keptFiles) mapFile(f *os.File, size int) (err error) {
	k.mapping, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map %s: %w", f.Name(), err)
	}
	return nil
}

// takeUpKept opens the files that an earlier run of the daemon kept in dir. fs.ErrNotExist: there are none.
func takeUpKept(dir string) (*keptFiles, *keptFactsV1, *migratedv1.PrepareIncomingRequest, error) {
	k := &keptFiles{dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, keptFacts))
	if err != nil {
		return nil, nil, nil, err
	}
	facts, request, err := readFacts(data, filepath.Join(dir, keptFacts))
	if err != nil {
		return nil, nil, nil, err
	}
	if err := k.open(); err != nil {
		return nil, nil, nil, err
	}
	return k, facts, request, nil
}

// readKept reads only the facts in dir.
func readKept(dir string) (*keptFactsV1, error) {
	path := filepath.Join(dir, keptFacts)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	facts, _, err := readFacts(data, path)
	return facts, err
}

// readFacts reads facts of any version that this daemon knows.
func readFacts(data []byte, path string) (*keptFactsV1, *migratedv1.PrepareIncomingRequest, error) {
	facts, request := new(keptFactsV1), new(migratedv1.PrepareIncomingRequest)
	if err := json.Unmarshal(data, &struct {
		Version *uint32 `json:"version"`
	}{&facts.Version}); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := version.CheckState(path, facts.Version); err != nil {
		return nil, nil, withRemedy(err, otherDaemon)
	}
	if err := json.Unmarshal(data, facts); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	// This daemon ignores what a newer one added. A change that it could not ignore has another version.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(facts.Request, request); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := version.CheckProtocol(path, request.GetProtocol()); err != nil {
		return nil, nil, withRemedy(err, otherDaemon)
	}
	return facts, request, nil
}

func (k *keptFiles) open() error {
	f, err := os.OpenFile(filepath.Join(k.dir, keptStates), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < keptHeaderSize {
		return fmt.Errorf("%s has %d bytes", f.Name(), info.Size())
	}
	if err := k.mapFile(f, int(info.Size())); err != nil {
		return err
	}
	if k.header().magic&^math.MaxUint32 != keptMagic {
		return errors.Join(fmt.Errorf("%s holds no page states", f.Name()), k.close())
	}
	if err := version.CheckState(f.Name(), uint32(k.header().magic)); err != nil {
		return errors.Join(withRemedy(err, otherDaemon), k.close())
	}
	return nil
}

// header may also be read after close, but not during it.
func (k *keptFiles) header() *keptHeader {
	if k.mapping == nil {
		return k.last
	}
	return (*keptHeader)(unsafe.Pointer(&k.mapping[0]))
}

func (k *keptFiles) copies() []byte { return k.mapping[keptCopies:keptHeaderSize] }
func (k *keptFiles) states() []byte { return k.mapping[keptHeaderSize:] }

// close leaves the files for a restarted daemon. After it, only the header may be used.
func (k *keptFiles) close() error {
	if k.mapping == nil {
		return nil
	}
	mapping := k.mapping
	k.last = new(keptHeader)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(k.last)), unsafe.Sizeof(*k.last)), mapping)
	k.mapping = nil
	return unix.Munmap(mapping)
}

// remove removes the files. It removes the facts first: a directory without facts holds no migration.
func (k *keptFiles) remove() error {
	errs := []error{k.close()}
	for _, name := range []string{keptFacts, keptStates} {
		if err := os.Remove(filepath.Join(k.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

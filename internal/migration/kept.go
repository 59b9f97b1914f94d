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
	"github.com/migrated-vm/migrated/internal/version"
	"github.com/migrated-vm/migrated/pkg/postcopy"
	"github.com/migrated-vm/migrated/pkg/uffd"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

const (
	keptFacts  = "migration.json"
	keptStates = "pages"
)

// kept is what of a migration to this host outlives the daemon: a file of facts that is written once, before the
// device state comes, and a mapped file that changes while the VM stands still and after, at the cost of a store in
// memory. Both are about memory of this host, and worth nothing after a reboot.
type kept struct {
	dir     string
	mapping []byte // header, then the states of all pages
}

// keptFactsV1 is the content of keptFacts.
type keptFactsV1 struct {
	Version  uint32          `json:"version"`
	Request  json.RawMessage `json:"request"` // a PrepareIncomingRequest
	QEMU     qemu.Identity   `json:"qemu"`
	QMP      string          `json:"qmp"`
	RemoteFD int             `json:"remote_fd"` // of the userfaultfd, in QEMU
	Blocks   []keptBlock     `json:"ram_blocks"`
	Discards bool            `json:"discards"` // as the engine was told
	Settings *qemu.Settings  `json:"settings"` // to be put back in QEMU

	// For show: what was asked for when the descriptor was made cannot be read off it.
	Supervision uffd.Supervision `json:"supervision"`
	Label       string           `json:"label"`
}

// keptBlock is a RAM block, in the order of the request.
type keptBlock struct {
	ID       string `json:"id"`
	Addr     uint64 `json:"addr"` // in QEMU
	Size     uint64 `json:"size"`
	PageSize uint64 `json:"page_size"`
	// Populated: it is to be all there in the end, see postcopy.Block.
	Populated bool `json:"populated,omitempty"`
}

// keptHeader begins the mapped file. Times are in nanoseconds.
type keptHeader struct {
	magic uint64 // keptMagic, and the version in its lower half
	// loaded is set when QEMU has the whole device state.
	loaded atomic.Uint64
	// toldToRun is set before QEMU is told to run the VM: while it is 0 the VM has not run here.
	toldToRun atomic.Uint64
	// resumed is when the VM ran, Unix time; 0 before.
	resumed    atomic.Int64
	resumeTime atomic.Int64
	downtime   atomic.Int64
	// filled is set when all memory is here, before QEMU's descriptor is closed.
	filled atomic.Uint64
	// bandwidth is the limit that the source asked for last, bytes a second; 0: none, also of daemons that knew of none.
	bandwidth atomic.Uint64
	// settled is set when nothing but the word of a completed migration is left: QEMU is nobody's of ours any more.
	settled atomic.Uint64
	// ended is the Reason of a VM that ended by itself; 0: it has not.
	ended atomic.Uint64
	// paused is set of a VM that was paused, and was not run here.
	paused atomic.Uint64
}

const (
	keptMagic      = 0x6d696772_00000000
	keptHeaderSize = 4096
	// keptCopies is where, within the header, the kernel answers the engine's copies; zeros in the file of a daemon that
	// did not know of them, which is no answer.
	keptCopies = 1024
)

// engineBlocks are the blocks as the engine wants them.
func (f *keptFactsV1) engineBlocks(u *uffd.UFFD) []postcopy.Block {
	blocks := make([]postcopy.Block, 0, len(f.Blocks))
	for _, b := range f.Blocks {
		blocks = append(blocks, postcopy.Block{
			ID: b.ID, Addr: b.Addr, Size: b.Size, PageSize: b.PageSize, UFFD: u, Populated: b.Populated,
		})
	}
	return blocks
}

// keep makes the files of a new migration.
func keep(dir string, facts *keptFactsV1, request *migratedv1.PrepareIncomingRequest) (*kept, error) {
	k := &kept{dir: dir}
	if _, err := os.Lstat(filepath.Join(dir, keptFacts)); err == nil {
		return nil, withRemedy(fmt.Errorf("%s holds a migration with the same id that has not ended", dir),
			"restart the daemon, which takes it up, or choose another id")
	}
	if err := k.create(facts, request); err != nil {
		return nil, fmt.Errorf("keep what a restarted daemon needs of the migration: %w", errors.Join(err, k.forget()))
	}
	return k, nil
}

func (k *kept) create(facts *keptFactsV1, request *migratedv1.PrepareIncomingRequest) error {
	size := keptHeaderSize + postcopy.StateSize(facts.engineBlocks(nil))
	f, err := os.OpenFile(filepath.Join(k.dir, keptStates), os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close() // the mapping stays
	// A file system that is full is found out now, not by a SIGBUS in the middle of a fault.
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

func (k *kept) mapFile(f *os.File, size int) (err error) {
	k.mapping, err = unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map %s: %w", f.Name(), err)
	}
	return nil
}

// takeUpKept opens what an earlier run of the daemon kept in dir; fs.ErrNotExist: nothing.
func takeUpKept(dir string) (*kept, *keptFactsV1, *migratedv1.PrepareIncomingRequest, error) {
	k := &kept{dir: dir}
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

// readKept reads the facts alone that are kept in dir.
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
	// What a newer daemon added is of no use to this one; what it needs has another version.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(facts.Request, request); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := version.CheckProtocol(path, request.GetProtocol()); err != nil {
		return nil, nil, withRemedy(err, otherDaemon)
	}
	return facts, request, nil
}

func (k *kept) open() error {
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

func (k *kept) header() *keptHeader { return (*keptHeader)(unsafe.Pointer(&k.mapping[0])) }
func (k *kept) copies() []byte      { return k.mapping[keptCopies:keptHeaderSize] }
func (k *kept) states() []byte      { return k.mapping[keptHeaderSize:] }

// running writes down that the VM runs here.
func (k *kept) running(at time.Time, resumeTime, downtime time.Duration) {
	h := k.header()
	h.resumeTime.Store(int64(resumeTime))
	h.downtime.Store(int64(downtime))
	h.resumed.Store(at.UnixNano())
}

// close leaves the files for a later daemon. Nothing of the mapping is used any more.
func (k *kept) close() error {
	if k.mapping == nil {
		return nil
	}
	mapping := k.mapping
	k.mapping = nil
	return unix.Munmap(mapping)
}

// forget removes the files. A migration without facts is none, so these go first.
func (k *kept) forget() error {
	errs := []error{k.close()}
	for _, name := range []string{keptFacts, keptStates} {
		if err := os.Remove(filepath.Join(k.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

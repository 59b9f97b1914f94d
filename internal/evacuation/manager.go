// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/migrated-vm/migrated/internal/atomicfile"
	"github.com/migrated-vm/migrated/internal/migration"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// keptEvacuations is how many evacuations are remembered.
const keptEvacuations = 20

// suffix ends the names of files with evacuations.
const suffix = ".json"

// Errors of a Manager.
var (
	ErrUnderWay = errors.New("another evacuation is under way")
	ErrExists   = errors.New("an evacuation of that id exists with another specification")
	ErrUnknown  = errors.New("this daemon knows no such evacuation")
	ErrOver     = errors.New("the evacuation is over")
)

// A Manager keeps the evacuations of a host: at most one under way, and the last that are over.
type Manager struct {
	dir  string
	host Host
	log  *slog.Logger

	mu  sync.Mutex
	all map[string]*evacuation

	life    context.Context //nolint:containedctx // evacuations run until it ends, with the daemon
	running sync.WaitGroup
}

// Open reads the evacuations that an earlier run of the daemon has written to dir, and continues one that was under
// way, until life ends. A file that cannot be read is logged and left alone: the migrations of its VMs have records of
// their own.
func Open(life context.Context, dir string, host Host, log *slog.Logger) (*Manager, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of evacuations: %w", err)
	}
	m := &Manager{dir: dir, host: host, log: log, all: make(map[string]*evacuation), life: life}
	paths, err := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		view, err := read(path)
		if err != nil {
			log.Error("an evacuation that an earlier run of this daemon left cannot be read", "path", path, "error", err,
				"remedy", "look at the VMs of this host with 'migrated vms', and evacuate again")
			continue
		}
		e := newEvacuation(host, view, m.write)
		m.all[view.GetId()] = e
		if Over(view.GetState()) {
			close(e.done)
			continue
		}
		log.Info("continuing an evacuation", "evacuation", view.GetId())
		m.running.Go(func() { m.run(e) })
	}
	return m, nil
}

// read reads the file of an evacuation.
func read(path string) (*migratedv1.Evacuation, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	view := &migratedv1.Evacuation{}
	// A newer daemon may have written fields that this one does not know.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(text, view); err != nil {
		return nil, err
	}
	if view.GetId()+suffix != filepath.Base(path) {
		return nil, fmt.Errorf("it is of evacuation %q", view.GetId())
	}
	return view, nil
}

func (m *Manager) path(id string) string { return filepath.Join(m.dir, id+suffix) }

// write writes the file of an evacuation, and logs an error.
func (m *Manager) write(view *migratedv1.Evacuation) error {
	text, err := protojson.Marshal(view)
	if err == nil {
		err = atomicfile.Write(m.path(view.GetId()), text, 0o600)
	}
	if err != nil {
		err = fmt.Errorf("save the evacuation: %w", err)
		m.log.Error("cannot save an evacuation: a restarted daemon would not know its state",
			"evacuation", view.GetId(), "error", err)
	}
	return err
}

// run runs an evacuation, and logs its end.
func (m *Manager) run(e *evacuation) {
	e.run(m.life)
	view, _ := e.Snapshot()
	log := m.log.With("evacuation", view.GetId())
	if !Over(view.GetState()) {
		return // the daemon ends
	}
	counts := make(map[migratedv1.EvacuatedVMState]int)
	for _, vm := range view.GetVms() {
		counts[vm.GetState()]++
	}
	if message := view.GetError().GetMessage(); message != "" {
		log = log.With("error", message)
	}
	log.Info("evacuation is over", "state", migration.Name(view.GetState(), "EVACUATION_STATE_"),
		"vms", len(view.GetVms()), "moved", counts[migratedv1.EvacuatedVMState_EVACUATED_VM_STATE_MOVED])
}

// Begin begins an evacuation, or returns the current state of the one with that id and specification. The errors are
// ErrUnderWay, ErrExists, and that of a file that could not be written.
func (m *Manager) Begin(id string, spec *migratedv1.EvacuationSpec) (*migratedv1.Evacuation, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.all[id]; e != nil {
		view, _ := e.Snapshot()
		if !proto.Equal(view.GetSpec(), spec) {
			return nil, fmt.Errorf("%w: %s", ErrExists, id)
		}
		return view, nil
	}
	for other, e := range m.all {
		if !Over(e.state()) {
			return nil, fmt.Errorf("%w: %s", ErrUnderWay, other)
		}
	}
	view := &migratedv1.Evacuation{
		Id: id, Spec: proto.CloneOf(spec), State: migratedv1.EvacuationState_EVACUATION_STATE_PLANNING,
		CreateTime: timestamppb.Now(), UpdateTime: timestamppb.Now(),
	}
	if err := m.write(view); err != nil {
		return nil, err
	}
	m.forgetOld()
	e := newEvacuation(m.host, view, m.write)
	m.all[id] = e
	m.log.Info("evacuation begins", "evacuation", id, "destinations", strings.Join(spec.GetDestinations(), ", "))
	m.running.Go(func() { m.run(e) })
	view, _ = e.Snapshot()
	return view, nil
}

// forgetOld removes the oldest evacuations that are over, to make room for one. The caller holds mu.
func (m *Manager) forgetOld() {
	views := m.list()
	for _, view := range views[min(len(views), keptEvacuations-1):] {
		if !Over(view.GetState()) {
			continue
		}
		delete(m.all, view.GetId())
		if err := os.Remove(m.path(view.GetId())); err != nil {
			m.log.Warn("an old evacuation stays", "evacuation", view.GetId(), "error", err)
		}
	}
}

// List returns all evacuations, newest first.
func (m *Manager) List() []*migratedv1.Evacuation {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.list()
}

// list is List for callers that hold mu.
func (m *Manager) list() (views []*migratedv1.Evacuation) {
	for _, e := range m.all {
		view, _ := e.Snapshot()
		views = append(views, view)
	}
	slices.SortFunc(views, func(a, b *migratedv1.Evacuation) int {
		return b.GetCreateTime().AsTime().Compare(a.GetCreateTime().AsTime())
	})
	return views
}

// find returns an evacuation, or ErrUnknown.
func (m *Manager) find(id string) (*evacuation, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e := m.all[id]; e != nil {
		return e, nil
	}
	return nil, fmt.Errorf("%w: %q", ErrUnknown, id)
}

// Snapshot returns the current state of an evacuation, and a channel that is closed when it changes. The error is
// ErrUnknown.
func (m *Manager) Snapshot(id string) (*migratedv1.Evacuation, <-chan struct{}, error) {
	e, err := m.find(id)
	if err != nil {
		return nil, nil, err
	}
	view, changed := e.Snapshot()
	return view, changed, nil
}

// Pause starts no more migrations of an evacuation; those under way continue. Pause, Resume and Cancel may be
// repeated. The errors are ErrUnknown, ErrOver, and that of a file that could not be written: the command
// then has its effect until the daemon ends.
func (m *Manager) Pause(id string) (*migratedv1.Evacuation, error) {
	return m.command(id, func(state migratedv1.EvacuationState) migratedv1.EvacuationState {
		if state == migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING {
			return state
		}
		return migratedv1.EvacuationState_EVACUATION_STATE_PAUSED
	})
}

// Resume undoes Pause. Its errors are those of Pause.
func (m *Manager) Resume(id string) (*migratedv1.Evacuation, error) {
	return m.command(id, func(state migratedv1.EvacuationState) migratedv1.EvacuationState {
		if state == migratedv1.EvacuationState_EVACUATION_STATE_PAUSED {
			return migratedv1.EvacuationState_EVACUATION_STATE_RUNNING
		}
		return state
	})
}

// Cancel cancels an evacuation, and those of its migrations that have not handed over their VMs. Its errors are
// those of Pause.
func (m *Manager) Cancel(id string) (*migratedv1.Evacuation, error) {
	return m.command(id, func(migratedv1.EvacuationState) migratedv1.EvacuationState {
		return migratedv1.EvacuationState_EVACUATION_STATE_CANCELLING
	})
}

// command changes the state of an evacuation by next, saves it, and wakes the evacuation.
func (m *Manager) command(
	id string, next func(migratedv1.EvacuationState) migratedv1.EvacuationState,
) (*migratedv1.Evacuation, error) {
	e, err := m.find(id)
	if err != nil {
		return nil, err
	}
	e.update(func(view *migratedv1.Evacuation) {
		if Over(view.GetState()) {
			err = fmt.Errorf("%w: %s", ErrOver, id)
			return
		}
		view.State = next(view.GetState())
	})
	if err != nil {
		return nil, err
	}
	err = e.save()
	select {
	case e.wake <- struct{}{}:
	default:
	}
	view, _ := e.Snapshot()
	return view, err
}

// Follows returns the id of the evacuation that waits for the end of a migration; empty: none does.
func (m *Manager) Follows(migration string) (id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, e := range m.all {
		view, _ := e.Snapshot()
		if Over(view.GetState()) {
			continue
		}
		for _, vm := range view.GetVms() {
			if vm.GetMigration() == migration && !Last(vm.GetState()) {
				return id
			}
		}
	}
	return ""
}

// Wait returns when all evacuations have stopped, after the context of Open has ended.
func (m *Manager) Wait() { m.running.Wait() }

// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/version"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// buildDaemon builds the daemon with a build tag, and returns its path.
func buildDaemon(t *testing.T, tag string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "migrated-"+tag)
	if err := lab.BuildDaemon(testContext(t), tag, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// upgrade is a lab whose daemons are replaced by other versions.
type upgrade struct {
	*testing.T
	lab     *lab.Lab
	daemons map[*lab.Host]*lab.Process
}

// replace kills the daemon of a host and starts program in its place. If program is empty, that is the one under test.
func (u *upgrade) replace(h *lab.Host, program string) {
	u.Helper()
	mustKill(u.T, u.daemons[h])
	h.Daemon = program
	u.daemons[h] = startDaemon(u.T, h)
}

// checkVersions checks the versions of the files and of the protocol that both hosts keep for a migration under way.
func (u *upgrade) checkVersions(from, to *lab.Host, id string, state, protocol uint32) {
	u.Helper()
	var record struct{ Version, Protocol uint32 }
	readJSON(u.T, from.Path("/run/migrated/handed-over/"+id+".json"), &record)
	var kept struct {
		Version uint32
		Request struct{ Protocol uint32 }
	}
	readJSON(u.T, to.Path("/run/migrated/incoming/"+id+"/migration.json"), &kept)
	if record.Protocol != protocol || kept.Request.Protocol != protocol {
		u.Errorf("migration %s keeps to protocol %d at the source and %d at the destination, want %d",
			id, record.Protocol, kept.Request.Protocol, protocol)
	}
	if kept.Version != state {
		u.Errorf("migration %s has files of version %d at the destination, want %d", id, kept.Version, state)
	}
}

func readJSON(t *testing.T, path string, into any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestUpgrade replaces daemons by those of the next version, and by those of the version before, in the middle of the
// migrations of a busy guest. Each migration completes.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	next := buildDaemon(t, "raised") // its protocol and its files are of the next version (internal/version)
	l := linkedHosts(t, travellerLink)
	a, b := l.A, l.B
	u := &upgrade{t, l, map[*lab.Host]*lab.Process{a: startDaemon(t, a), b: startDaemon(t, b)}}
	v := newTraveller(t, l)

	u.Log("the destination is upgraded in the middle")
	v.move(func(id string) {
		u.replace(b, next)
		inFlight(t, id, b)
		u.checkVersions(a, b, id, version.State, version.Protocol)
	})
	u.Log("a newer source, an older destination")
	v.move(func(id string) { u.checkVersions(b, a, id, version.State, version.Protocol) })
	u.Log("an older source, a newer destination; the source is upgraded in the middle")
	v.move(func(id string) {
		u.checkVersions(a, b, id, version.State+1, version.Protocol)
		u.replace(a, next)
		inFlight(t, id, b)
	})
	u.Log("both of the newer version; the destination meets what it does not know")
	v.move(func(id string) {
		u.checkVersions(b, a, id, version.State+1, version.Protocol+1)
		u.replace(a, "")
		u.checkUnknownIncoming(a, id)
		u.replace(a, next)
		inFlight(t, id, a)
	})
	u.Log("both of the newer version; the source meets what it does not know")
	v.move(func(id string) {
		u.checkVersions(a, b, id, version.State+1, version.Protocol+1)
		mustKill(t, u.daemons[a])
		u.checkRefusesRecord(a, id)
		u.daemons[a] = startDaemon(t, a)
		inFlight(t, id, b)
	})
}

// checkUnknownIncoming checks that an older daemon serves, although a newer one left a migration that it cannot read.
// It says so, and leaves the migration's files. The source does not give the migration up.
func (u *upgrade) checkUnknownIncoming(h *lab.Host, id string) {
	u.Helper()
	answer, err := control(u.T, h).Get(testContext(u.T), &migratedv1.GetRequest{Id: id})
	if answer.GetMigration().GetError().GetReason() != migratedv1.Reason_REASON_VERSION {
		u.Errorf("an older daemon does not say that it cannot read migration %s: %v, %v", id, answer, err)
	}
	if _, err := os.Stat(h.Path("/run/migrated/incoming/" + id + "/migration.json")); err != nil {
		u.Error(err)
	}
	if m := get(u.T, u.lab.Other(h), id); migration.Terminal(m.GetState()) {
		u.Errorf("the source has given the migration up: %v", m)
	}
}

// checkRefusesRecord checks that the daemon under test does not serve on a host where a newer one handed a VM over. It
// says what to do, and leaves the record as it is.
func (u *upgrade) checkRefusesRecord(h *lab.Host, id string) {
	u.Helper()
	path := h.Path("/run/migrated/handed-over/" + id + ".json")
	before, err := os.ReadFile(path)
	if err != nil {
		u.Fatal(err)
	}
	program, err := lab.Binary()
	if err != nil {
		u.Fatal(err)
	}
	out, err := h.Command(testContext(u.T), program, "serve", "--plaintext", "--listen", h.DaemonAddr()).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "What to do: start the version of migrated that wrote it") {
		u.Errorf("an older daemon ends with %v: %s", err, out)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		u.Errorf("the record was %q and is %q: %v", before, after, err)
	}
}

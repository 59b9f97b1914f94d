// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// A refusal is something about a VM for which it cannot be moved as it is.
type refusal struct {
	name string
	// bring brings it about, in a VM that can be moved.
	bring func(s *scene)
	// mend undoes it by what the remedy says.
	mend  func(s *scene)
	args  []string // of check and migrate
	words []string // of both
}

// refusedByBoth has check and migrate look at the VM: both refuse it with these words, and the VM goes on.
func (s *scene) refusedByBoth(args, words []string) {
	s.Helper()
	for _, name := range []string{"check", "migrate"} {
		out, code := operate(s.T, s.lab.A, append([]string{name, "--vm", lab.QMPPath, "--to", s.lab.B.DaemonAddr()}, args...)...)
		s.Logf("%s: exit code %d:\n%s", name, code, out)
		if code == 0 {
			s.Fatalf("%s says that all is well", name)
		}
		says := strings.Join(strings.Fields(out), " ")
		for _, word := range words {
			if !strings.Contains(says, word) {
				s.Errorf("%s does not say %q", name, word)
			}
		}
		if name == "migrate" && !strings.Contains(says, "the VM was not touched") {
			s.Errorf("%s does not say that the VM was not touched", name)
		}
	}
	s.countsOn()
}

// acceptedByCheck: what was mended is refused no more.
func (s *scene) acceptedByCheck(args []string) {
	s.Helper()
	out, code := operate(s.T, s.lab.A, append([]string{"check", "--vm", lab.QMPPath, "--to", s.lab.B.DaemonAddr()}, args...)...)
	if code != 0 {
		s.Errorf("check: exit code %d after it was mended:\n%s", code, out)
	}
}

// goneJobs waits until no job is left.
func (s *scene) goneJobs() {
	s.Helper()
	ctx := testContext(s.T)
	for {
		var jobs []struct{}
		ask(s.T, s.lab.A, "query-jobs", nil, &jobs)
		if len(jobs) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			s.Fatal("the job does not end")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// cancelJob ends a job.
func (s *scene) cancelJob() {
	s.Helper()
	ask(s.T, s.lab.A, "job-cancel", map[string]string{"id": "copy"}, nil)
	s.goneJobs()
}

// tasks are what a QEMU does for somebody besides running its VM.
var tasks = []refusal{
	{
		name: "mirror",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "drive-mirror", map[string]any{
				"job-id": "copy", "device": "disk0", "target": lab.SharedDir + "/mirror.qcow2", "sync": "full", "format": "qcow2",
			}, nil)
		},
		mend:  (*scene).cancelJob,
		words: []string{`the job "copy" (mirror`, "would be lost", "job-complete"},
	},
	{
		name: "backup",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "drive-backup", map[string]any{
				"job-id": "copy", "device": "disk0", "target": lab.SharedDir + "/backup.raw", "sync": "full", "format": "raw", "speed": 1,
			}, nil)
		},
		mend:  (*scene).cancelJob,
		words: []string{`the job "copy" (backup`, "would be lost", "job-cancel"},
	},
	{
		name: "NBD export",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "nbd-server-start", map[string]any{
				"addr": map[string]any{"type": "unix", "data": map[string]string{"path": lab.VMDir + "/nbd.sock"}},
			}, nil)
			ask(s.T, s.lab.A, "block-export-add", map[string]any{"type": "nbd", "id": "shown", "node-name": "disk0"}, nil)
		},
		mend:  func(s *scene) { ask(s.T, s.lab.A, "nbd-server-stop", nil, nil) },
		words: []string{`"disk0"`, `the export "shown" (nbd)`, "nbd-server-stop"},
	},
	{
		name: "dirty bitmap",
		bring: func(s *scene) {
			ask(s.T, s.lab.A, "block-dirty-bitmap-add", map[string]any{"node": "disk0", "name": "nightly"}, nil)
		},
		mend: func(s *scene) {
			ask(s.T, s.lab.A, "block-dirty-bitmap-remove", map[string]any{"node": "disk0", "name": "nightly"}, nil)
		},
		words: []string{`the dirty bitmap "nightly"`, `"disk0"`, "would be lost", "block-dirty-bitmap-remove"},
	},
}

// TestRefusals: what cannot be moved as it is, check and migrate refuse in the same words, before the VM is touched; what
// the remedy says helps, and the VM moves in the end.
func TestRefusals(t *testing.T) {
	l := newLab(t)
	outer := newScene(t, l)
	for _, c := range tasks {
		t.Run(c.name, func(t *testing.T) {
			s := *outer
			s.T = t
			c.bring(&s)
			s.refusedByBoth(c.args, c.words)
			c.mend(&s)
			s.acceptedByCheck(c.args)
		})
	}
	migrate(t, l.A, l.B, "then")
	outer.arrived()
}

// TestTaskThatBeginsLater: between Prepare and Start the VM is its operator's. What was begun then is refused while the
// VM runs.
func TestTaskThatBeginsLater(t *testing.T) {
	l := newLab(t)
	outer := newScene(t, l)
	for _, c := range tasks {
		t.Run(c.name, func(t *testing.T) {
			s := *outer
			s.T = t
			id := strings.ReplaceAll(c.name, " ", "-")
			client := s.prepare(id)
			c.bring(&s)
			if _, err := client.Start(testContext(t), &migratedv1.StartRequest{Id: id}); err != nil {
				t.Fatal(err)
			}
			m := await(t, client, id, func(*migratedv1.Migration) bool { return false })
			s.failed(m, stateFailed, append(c.words, "the VM was not touched")...)
			c.mend(&s)
		})
	}
}

// TestPersistentBitmapMoves with its image, and goes on at the destination.
func TestPersistentBitmapMoves(t *testing.T) {
	l := newLab(t)
	s := newScene(t, l)
	ask(t, l.A, "block-dirty-bitmap-add", map[string]any{"node": "disk0", "name": "nightly", "persistent": true}, nil)
	migrate(t, l.A, l.B, "bitmap")
	s.arrived()
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Name      string `json:"name"`
			Recording bool   `json:"recording"`
		} `json:"dirty-bitmaps"`
	}
	client, err := l.B.QMP(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(client.Do(testContext(t), "query-named-block-nodes", nil, &nodes), client.Disconnect()); err != nil {
		t.Fatal(err)
	}
	found := fmt.Sprint(nodes)
	if !strings.Contains(found, "{disk0 [{nightly true}]}") {
		t.Errorf("the destination has the nodes and bitmaps %s", found)
	}
}

// SPDX-License-Identifier: Apache-2.0

package evacuation

import (
	"os"
	"path/filepath"
	"testing"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestReadsWhatANewerDaemonWrote: fields that this daemon does not know are ignored, and the rest is read.
func TestReadsWhatANewerDaemonWrote(t *testing.T) {
	path := filepath.Join(t.TempDir(), "e1.json")
	const newer = `{"id": "e1", "state": "EVACUATION_STATE_RUNNING", "later": {"than": ["this"]}, ` +
		`"vms": [{"vm": "/run/vm/a", "newer": 1}]}`
	if err := os.WriteFile(path, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	e, err := read(path)
	if err != nil {
		t.Fatal(err)
	}
	if e.GetState() != migratedv1.EvacuationState_EVACUATION_STATE_RUNNING || len(e.GetVms()) != 1 ||
		e.GetVms()[0].GetVm() != "/run/vm/a" {
		t.Errorf("it is read as %v", e)
	}
}

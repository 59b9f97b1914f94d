// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"testing"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// settings are the settings of a VM's QEMU that migrated changes before it loads a VM. A test queries one after the
// other: while migrated restores them, one may have its old value and the other not.
type settings struct {
	late   bool // late-block-activate
	rounds int  // announce-rounds
}

var changedSettings, ownSettings = settings{late: true, rounds: 1}, settings{late: false, rounds: 5}

// settingsOf returns the settings of the QEMU on h.
func settingsOf(t *testing.T, h *lab.Host) settings {
	t.Helper()
	var capabilities []struct {
		Name string `json:"capability"`
		On   bool   `json:"state"`
	}
	ask(t, h, "query-migrate-capabilities", nil, &capabilities)
	var has settings
	for _, c := range capabilities {
		has.late = has.late || c.Name == "late-block-activate" && c.On
	}
	var parameters struct {
		AnnounceRounds int `json:"announce-rounds"`
	}
	ask(t, h, "query-migrate-parameters", nil, &parameters)
	has.rounds = parameters.AnnounceRounds
	return has
}

// TestSettingsArePutBackLater: the destination's daemon was killed. When it is started again and when the last page
// arrives, another client holds QEMU's monitor. QEMU gets its settings back when the monitor is free, by this daemon or
// the next.
func TestSettingsArePutBackLater(t *testing.T) {
	t.Parallel()
	l := newHosts(t)
	startDaemon(t, l.A)
	b := startDaemon(t, l.B)
	s := largeScene(t, l, 1)
	s.moveHalfway("held")
	mustKill(t, b)
	holder, err := l.B.QMP(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	b = startDaemon(t, l.B)
	s.cable(true)
	completed(t, awaitEnd(t, control(t, l.A), "held"))
	if has := settingsOf(t, l.B); has != changedSettings {
		t.Fatalf("QEMU has %+v although its monitor is another's, expected %+v", has, changedSettings)
	}
	if err := b.Stop(testContext(t)); err != nil {
		t.Fatal(err)
	}
	startDaemon(t, l.B)
	if err := holder.Disconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if has := settingsOf(t, l.B); has != ownSettings {
			return fmt.Errorf("QEMU keeps %+v, expected %+v", has, ownSettings)
		}
		return nil
	})
	s.arrived()
	onlyWordKept(t, l.A, l.B)
}

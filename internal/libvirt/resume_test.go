// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// TestContIsLibvirts: libvirt continues a domain that it takes for paused, and QEMU gets no cont but that. libvirt's
// refusal is QEMU's as long as QEMU answers. Else it is not known whether QEMU got the command.
func TestContIsLibvirts(t *testing.T) {
	const locked = "the lease of the image is taken"
	paused, running := `{"return": {"running": false}}`, `{"return": {"running": true}}`
	for name, c := range map[string]struct {
		state     golibvirt.DomainState
		status    string // QEMU's answer to query-status
		meanwhile func(*libvirttest.Daemon, *exec.Cmd)
		calls     []string // of libvirt
		cont      bool     // QEMU got cont from this host's daemon
		refused   bool
		unknown   bool
	}{
		"paused":              {state: golibvirt.DomainPaused, calls: []string{"resume"}},
		"it suspended itself": {state: golibvirt.DomainPmsuspended, cont: true},
		"refused": {
			state: golibvirt.DomainPaused, status: paused, refused: true,
			meanwhile: func(d *libvirttest.Daemon, _ *exec.Cmd) { d.Refuse("resume", locked) },
		},
		"refused, and it runs": {
			state: golibvirt.DomainPaused, status: running,
			meanwhile: func(d *libvirttest.Daemon, _ *exec.Cmd) { d.Refuse("resume", locked) },
		},
		"QEMU does not answer any more": {
			state: golibvirt.DomainPaused, unknown: true,
			meanwhile: func(d *libvirttest.Daemon, qemu *exec.Cmd) {
				d.Refuse("resume", "End of file from qemu monitor")
				d.Before("resume", func() {
					_ = qemu.Process.Kill()
					_ = qemu.Wait() // it was killed
					d.TellStopped()
				})
			},
		},
		"started anew meanwhile": {
			state: golibvirt.DomainPaused, unknown: true,
			meanwhile: func(d *libvirttest.Daemon, _ *exec.Cmd) {
				d.Before("lookup by UUID", func() {
					d.StartAnew()
					d.TellStopped()
				})
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			daemon, d := aRun(t)
			client, qemu, _, err := monitorOf(t, daemon, d)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Disconnect() //nolint:errcheck // QEMU may have ended
			daemon.Change(func(d *libvirttest.Domain) { d.State = c.state })
			var got []string
			daemon.Monitor(func(text string) string {
				got = append(got, text)
				if strings.Contains(text, "query-status") {
					return c.status
				}
				return `{"return": {}}`
			})
			if c.meanwhile != nil {
				c.meanwhile(daemon, qemu)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			err = client.Do(ctx, "cont", nil, nil)
			var gone *qmp.DisconnectedError
			refused := errors.Is(err, qmp.ErrGeneric) && strings.Contains(err.Error(), locked)
			if refused != c.refused || errors.As(err, &gone) != c.unknown || err != nil && !c.refused && !c.unknown {
				t.Errorf("cont: %v", err)
			}
			if called := daemon.Called(); !slices.Equal(called, c.calls) {
				t.Errorf("libvirt was asked to %v, want %v", called, c.calls)
			}
			if cont := strings.Contains(strings.Join(got, ""), `"cont"`); cont != c.cont {
				t.Errorf("QEMU got %v", got)
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/json"
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

// aRun returns a daemon with a running domain that is defined, and the run of it.
func aRun(t *testing.T) (*libvirttest.Daemon, *Domain) {
	t.Helper()
	daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db", Number: 3, Persistent: true, XML: plain})
	d, err := Open(t.Context(), daemon.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return daemon, d
}

// TestOnlyItsRunIsChanged: a call that changes a domain reaches the run that was opened, and no later one. The domain
// that was started anew goes on, and stays defined.
func TestOnlyItsRunIsChanged(t *testing.T) {
	shutOff := func(d *libvirttest.Domain) { d.Number = -1 }
	for name, c := range map[string]struct {
		call string
		do   func(*Domain, context.Context) error
		want error // of a run that is over
	}{
		"destroy":  {"destroy", (*Domain).Destroy, nil},
		"undefine": {"undefine", (*Domain).Undefine, ErrOtherRun},
		"persist":  {"define", (*Domain).Persist, ErrOtherRun},
	} {
		for when, change := range map[string]func(*libvirttest.Daemon){
			"started anew":           (*libvirttest.Daemon).StartAnew,
			"started anew meanwhile": func(d *libvirttest.Daemon) { d.Before("lookup by UUID", d.StartAnew) },
			"shut off":               func(d *libvirttest.Daemon) { d.Change(shutOff) },
		} {
			t.Run(name+", "+when, func(t *testing.T) {
				daemon, d := aRun(t)
				change(daemon)
				if err := c.do(d, t.Context()); !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if called := daemon.Called(); len(called) > 0 {
					t.Errorf("libvirt was asked to %v", called)
				}
			})
		}
		t.Run(name+", its run", func(t *testing.T) {
			daemon, d := aRun(t)
			if err := c.do(d, t.Context()); err != nil {
				t.Error(err)
			}
			if called := daemon.Called(); !slices.Equal(called, []string{c.call}) {
				t.Errorf("libvirt was asked to %v", called)
			}
		})
	}
}

// TestDestroyOfADomainThatIsGone: a transient domain that has ended is no error.
func TestDestroyOfADomainThatIsGone(t *testing.T) {
	daemon, d := aRun(t)
	daemon.Before("lookup by UUID", func() { daemon.Change(func(d *libvirttest.Domain) { d.Gone = true }) })
	if err := d.Destroy(t.Context()); err != nil || len(daemon.Called()) > 0 {
		t.Errorf("%v; libvirt was asked to %v", err, daemon.Called())
	}
}

// TestStartedRun: who has a domain started ends that run of it, and no later one.
func TestStartedRun(t *testing.T) {
	for name, c := range map[string]struct {
		meanwhile func(*libvirttest.Daemon)
		want      []string
	}{
		"it goes on":               {func(*libvirttest.Daemon) {}, []string{"create", "destroy"}},
		"its owner starts it anew": {(*libvirttest.Daemon).StartAnew, []string{"create"}},
	} {
		t.Run(name, func(t *testing.T) {
			daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db", Number: -1, Gone: true, XML: plain})
			d, err := Start(t.Context(), daemon.Socket, plain)
			if err != nil {
				t.Fatal(err)
			}
			c.meanwhile(daemon)
			if err := errors.Join(d.Destroy(t.Context()), d.Close()); err != nil {
				t.Error(err)
			}
			if called := daemon.Called(); !slices.Equal(called, c.want) {
				t.Errorf("libvirt was asked to %v, want %v", called, c.want)
			}
		})
	}
}

var errGivenUp = errors.New("the source gave up")

// TestStartInVain: where the migration ends while libvirt starts the domain, that run is ended, and no later one. A
// libvirt that has not answered may have started it.
func TestStartInVain(t *testing.T) {
	for name, c := range map[string]struct {
		meanwhile func(*libvirttest.Daemon)
		want      error
		calls     []string
	}{
		"it started": {func(*libvirttest.Daemon) {}, errGivenUp, []string{"create", "destroy"}},
		"its owner started it anew": {
			func(d *libvirttest.Daemon) { d.Before("lookup by UUID", d.StartAnew) }, errGivenUp, []string{"create"},
		},
		"libvirt ended": {
			func(d *libvirttest.Daemon) {
				d.Refuse("create", "not heard")
				d.Disconnect()
			}, ErrNoAnswer, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db", Number: -1, Gone: true, XML: plain})
			ctx, cancel := context.WithCancelCause(t.Context())
			daemon.Before("create", func() {
				cancel(errGivenUp)
				c.meanwhile(daemon)
			})
			if _, err := Start(ctx, daemon.Socket, plain); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if called := daemon.Called(); !slices.Equal(called, c.calls) {
				t.Errorf("libvirt was asked to %v, want %v", called, c.calls)
			}
		})
	}
}

// monitorOf connects to a domain whose QEMU is a process that only sleeps, and returns the commands that arrive there.
func monitorOf(t *testing.T, daemon *libvirttest.Daemon, d *Domain) (*qmp.Client, *exec.Cmd, chan string, error) {
	t.Helper()
	process := exec.Command("sleep", "600")
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait() // it was killed
	})
	arrived := make(chan string, 100)
	daemon.Monitor(func(text string) string {
		var c command
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Error(err)
		}
		switch arrived <- c.Execute; c.Execute {
		case "query-cpus-fast":
			return `{"return": []}`
		case "query-version":
			return `{"return": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": ""}}`
		case "query-status":
			return `{"return": {"running": true, "status": "running"}}`
		}
		return `{"return": {}}`
	})
	client, _, err := d.Monitor(t.Context(), func([]int, string) (int, bool) { return process.Process.Pid, true })
	return client, process, arrived, err
}

// TestNoCommandForALaterRun: a command for a QEMU that has ended fails as at QEMU's own socket. The QEMU of the domain
// that was started anew does not get it.
func TestNoCommandForALaterRun(t *testing.T) {
	daemon, d := aRun(t)
	client, process, arrived, err := monitorOf(t, daemon, d)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Disconnect() //nolint:errcheck // QEMU has ended
	if err := client.Do(t.Context(), "query-status", nil, nil); err != nil {
		t.Fatal(err)
	}
	daemon.StartAnew()
	if err := process.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = process.Wait() // it was killed
	daemon.TellStopped()
	for len(arrived) > 0 {
		<-arrived
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var gone *qmp.DisconnectedError
	if err := client.Do(ctx, "quit", nil, nil); !errors.As(err, &gone) {
		t.Errorf("quit: %v", err)
	}
	if len(arrived) > 0 {
		t.Errorf("the later run got %s", <-arrived)
	}
}

// TestMonitorOfALaterRun: where the domain is started anew while its QEMU is looked for, there is no monitor.
func TestMonitorOfALaterRun(t *testing.T) {
	daemon, d := aRun(t)
	daemon.Before("lookup by UUID", daemon.StartAnew)
	if _, _, _, err := monitorOf(t, daemon, d); !errors.Is(err, ErrOtherRun) || !strings.Contains(err.Error(), "db") {
		t.Errorf("%v, want %v", err, ErrOtherRun)
	}
}

// TestEventsOfALaterRun: an event of a later run is not forwarded as one of this QEMU.
func TestEventsOfALaterRun(t *testing.T) {
	daemon, d := aRun(t)
	client, _, _, err := monitorOf(t, daemon, d)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Disconnect() //nolint:errcheck // the events were read
	events := client.Subscribe("RESUME", "POWERDOWN")
	daemon.StartAnew()
	daemon.TellQEMU("RESUME")
	daemon.Change(func(d *libvirttest.Domain) { d.Number = -1 }) // as when its own run ends
	daemon.TellQEMU("POWERDOWN")
	select {
	case e := <-events.Events():
		if e.Name != "POWERDOWN" {
			t.Errorf("the later run's %s came", e.Name)
		}
	case <-time.After(30 * time.Second):
		t.Error("its own event did not come")
	}
}

// TestEndOfAnotherDomain: the end of another domain, or of a later run, is not that of this one.
func TestEndOfAnotherDomain(t *testing.T) {
	m := &monitor{domain: &Domain{id: golibvirt.Domain{Name: "db", ID: 3}}}
	other := m.domain.id
	other.UUID[0]++
	for _, c := range []struct {
		domain golibvirt.Domain
		want   bool
	}{
		{golibvirt.Domain{Name: "db", ID: 3}, true},
		{golibvirt.Domain{Name: "db", ID: -1}, true}, // its end
		{golibvirt.Domain{Name: "db", ID: 4}, false},
		{other, false},
	} {
		if m.isOf(c.domain) != c.want {
			t.Errorf("an event of %v counts: %v", c.domain, !c.want)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/internal/libvirt/libvirttest"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// TestOwnersOfADomainThatDidNotStart: libvirt gives an image to root when a domain fails to start. The VM runs at
// another host, and keeps it. The image of a domain that starts is left to libvirt.
func TestOwnersOfADomainThatDidNotStart(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root")
	}
	const user, ofLibvirt = 64055, 0
	for name, c := range map[string]struct {
		meanwhile func(*libvirttest.Daemon, context.CancelCauseFunc)
		fails     bool
		want      uint32
	}{
		"it started": {func(*libvirttest.Daemon, context.CancelCauseFunc) {}, false, ofLibvirt},
		"it failed": {
			func(d *libvirttest.Daemon, _ context.CancelCauseFunc) { d.Refuse("create", "no memory") }, true, user,
		},
		"the migration ended": {
			func(_ *libvirttest.Daemon, cancel context.CancelCauseFunc) { cancel(errGivenUp) }, true, user,
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			image := filepath.Join(dir, "image")
			if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Chown(image, user, user)); err != nil {
				t.Fatal(err)
			}
			definition := strings.Replace(plain, "</devices>", `<disk type="file"><source file="`+image+`"/></disk>`+
				`<disk type="file"><source file="`+image+`-that-is-not-there"/></disk></devices>`, 1)
			daemon := libvirttest.Start(t, libvirttest.Domain{Name: "db", Number: -1, Gone: true, XML: plain})
			ctx, cancel := context.WithCancelCause(t.Context())
			daemon.Before("create", func() {
				c.meanwhile(daemon, cancel)
				if err := os.Chown(image, ofLibvirt, ofLibvirt); err != nil {
					t.Error(err)
				}
			})
			d, err := Start(ctx, daemon.Socket, definition)
			if (err != nil) != c.fails || errors.Is(err, ErrOwner) {
				t.Errorf("%v", err)
			}
			if d != nil {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			var st unix.Stat_t
			if err := unix.Stat(image, &st); err != nil || st.Uid != c.want || st.Gid != c.want {
				t.Errorf("the image is user %d's, group %d's: %v", st.Uid, st.Gid, err)
			}
		})
	}
}

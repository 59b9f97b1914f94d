// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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

// noVolumes is a volumeFinder of a host without storage pools.
func noVolumes(pool, volume string) (string, error) { return "", fs.ErrNotExist }

// TestImagePaths: the forms in which a definition names an image.
func TestImagePaths(t *testing.T) {
	disk := func(inner string) string { return `<devices><disk>` + inner + `</disk></devices>` }
	for inner, want := range map[string][]string{
		disk(`<source file="/a"/>`): {"/a"},
		disk(`<source file="/a"/><backingStore type="file"><source file="/b"/><backingStore type="file">` +
			`<source file="/c"/></backingStore></backingStore>`): {"/a", "/b", "/c"},
		disk(`<source file="/a"/><mirror type="file" job="copy"><source file="/m"/></mirror>`): {"/a", "/m"},
		disk(`<source pool="p" volume="v"/>`):                                                  {"/pools/p/v"},
		disk(`<source pool="rbd" volume="v"/>`):                                                nil,
		disk(`<target dev="sda"/>`):                                                            nil,
		disk(`<source dev="/dev/sda"/>`):                                                       nil,
		"<os><nvram>/vars</nvram></os>":                                                        {"/vars"},
		"<os><nvram template='/t'/></os>":                                                      nil,
		"<os><nvram type='file'>\n  <source file='/vars'/>\n</nvram></os>":                     {"/vars"},
	} {
		_, root, err := parse("<domain>" + inner + "</domain>")
		if err != nil {
			t.Fatal(err)
		}
		paths, err := imagePaths(root, func(pool, volume string) (string, error) {
			if pool == "rbd" {
				return "rbd/" + volume, nil
			}
			return "/pools/" + pool + "/" + volume, nil
		})
		if err != nil || !slices.Equal(paths, want) {
			t.Errorf("%s: %q, %v, want %q", inner, paths, err, want)
		}
	}
	_, root, err := parse("<domain>" + disk(`<source pool="p" volume="v"/>`) + "</domain>")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := imagePaths(root, noVolumes); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a volume that is not there: %v", err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/migrated-vm/migrated/e2e/metal"
)

func TestCacheMakesWhatIsMissing(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	c, err := openCache()
	if err != nil {
		t.Fatal(err)
	}
	made := 0
	content := func() ([]byte, error) { made++; return []byte("content"), nil }
	broken := errors.New("broken")
	if _, err := c.file("f", func() ([]byte, error) { return []byte("half"), broken }); !errors.Is(err, broken) {
		t.Errorf("file = %v", err)
	}
	for want := 1; want <= 2; want++ { // made again after it is gone
		for range 2 {
			path, err := c.file("f", content)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != "content" || made != want {
				t.Errorf("%q, %v, made %d times, want %d", b, err, made, want)
			}
		}
		if err := os.Remove(filepath.Join(string(c), "f")); err != nil {
			t.Fatal(err)
		}
	}
	if left, _ := os.ReadDir(string(c)); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestMetalIsCachedBySize(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	a, err := Metal(t.Context(), 64)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Metal(t.Context(), 128)
	if err != nil {
		t.Fatal(err)
	}
	if a == b {
		t.Errorf("64 and 128 MiB share %s", a)
	}
	if info, err := os.Stat(a); err != nil || info.Size() != metal.ImageSize {
		t.Errorf("%v, %v", info, err)
	}
	if _, err := Metal(t.Context(), 1); !errors.Is(err, metal.ErrRAMSize) {
		t.Errorf("1 MiB: %v", err)
	}
}

func TestFindKernel(t *testing.T) {
	pack := func(names ...string) *bytes.Buffer {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, name := range names {
			if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 3}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte("abc")); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return &b
	}
	if b, err := findKernel(pack("./boot/config-6", "./boot/vmlinuz-6")); err != nil || string(b) != "abc" {
		t.Errorf("findKernel = %q, %v", b, err)
	}
	if _, err := findKernel(pack("./boot/config-6")); err == nil {
		t.Error("findKernel found a kernel where none is")
	}
}

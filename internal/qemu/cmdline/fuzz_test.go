// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// FuzzDestination checks, for any command line from a source, that the result starts an allowed program, waits for the
// migration, and has its monitor where this host wants it.
func FuzzDestination(f *testing.F) {
	for _, seed := range []string{
		"qemu-system-test", "qemu-system-test\n-m\n64", "qemu-system-test\n-qmp\nunix:/run/vm/qmp.sock,server=on",
		"qemu-system-test\n-chardev\nsocket,id=c,path=/run/vm/qmp.sock\n-mon\nc,mode=control", "/bin/sh\n-c\nreboot",
		"qemu-system-test\n-object\n{\"qom-type\":\"memory-backend-file\",\"prealloc\":true}",
		"qemu-system-test\n-object\n,,=,",
		"qemu-system-test\n-incoming\n-S\n-append\n-incoming", "qemu-system-test\n-object\n{", "\n", "qemu-system-test\n--",
	} {
		f.Add(seed)
	}
	dir := f.TempDir()
	binary := filepath.Join(dir, "qemu-system-test")
	if err := os.WriteFile(binary, nil, 0o755); err != nil {
		f.Fatal(err)
	}
	f.Setenv("PATH", dir)
	f.Fuzz(func(t *testing.T, line string) {
		argv, err := Destination(
			Source{Name: "vm", Args: strings.Split(line, "\n"), QMPPath: sourceQMP, Dir: "/"},
			Options{QMPPath: destinationQMP, Binaries: []string{binary}})
		if err != nil {
			return
		}
		if argv[0] != binary {
			t.Errorf("%q is started", argv[0])
		}
		if end := argv[len(argv)-3:]; !slices.Equal(end, []string{"-S", "-incoming", "defer"}) {
			t.Errorf("it ends in %q", end)
		}
		if !strings.Contains(strings.Join(argv, "\n"), destinationQMP) {
			t.Errorf("no monitor of ours in %q", argv)
		}
	})
}

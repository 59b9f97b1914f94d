// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"strconv"
	"testing"
)

// readCPIO is the kernel's way of reading (init/initramfs.c), for the test.
func readCPIO(t *testing.T, b []byte) map[string]cpioFile {
	t.Helper()
	files := map[string]cpioFile{}
	for pos := 0; ; {
		if len(b) < pos+110 || string(b[pos:pos+6]) != "070701" {
			t.Fatalf("no header at %d of %d", pos, len(b))
		}
		var f [13]int
		for i := range f {
			v, err := strconv.ParseUint(string(b[pos+6+8*i:pos+14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			f[i] = int(v)
		}
		nameEnd := pos + 110 + f[11]
		name := string(b[pos+110 : nameEnd-1])
		data := (nameEnd + 3) &^ 3
		if name == "TRAILER!!!" {
			return files
		}
		files[name] = cpioFile{name: name, mode: uint32(f[1]), major: uint32(f[9]), minor: uint32(f[10]), data: b[data : data+f[6]]}
		pos = (data + f[6] + 3) &^ 3
	}
}

func TestCPIO(t *testing.T) {
	in := []cpioFile{
		{name: "dev", mode: modeDir | 0o755},
		{name: "dev/console", mode: modeChar | 0o600, major: 5, minor: 1},
		{name: "init", mode: modeFile | 0o755, data: []byte("hello")},
		{name: "x", mode: modeFile | 0o644, data: []byte("four")},
		{name: "xy", mode: modeFile | 0o644, data: []byte{0}},
	}
	var b bytes.Buffer
	if err := writeCPIO(&b, in); err != nil {
		t.Fatal(err)
	}
	out := readCPIO(t, b.Bytes())
	if len(out) != len(in) {
		t.Errorf("%d files, want %d", len(out), len(in))
	}
	for _, want := range in {
		got := out[want.name]
		if got.mode != want.mode || got.major != want.major || got.minor != want.minor || !bytes.Equal(got.data, want.data) {
			t.Errorf("%s: %+v, want %+v", want.name, got, want)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package printable

import (
	"testing"

	"google.golang.org/protobuf/proto"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

func TestEscapes(t *testing.T) {
	for _, c := range []struct{ in, text, line string }{
		{"db-1", "db-1", "db-1"},
		{"größer, 大", "größer, 大", "größer, 大"},
		{"a\nb\tc", "a\nb\tc", `a\x0ab\x09c`},
		{"\x1b[2J\x07", `\x1b[2J\x07`, `\x1b[2J\x07`},
		{"\u009b2J\u202eevil\u2028", `\u009b2J\u202eevil\u2028`, `\u009b2J\u202eevil\u2028`},
		{"caf\xe9 \xff", `caf\xe9 \xff`, `caf\xe9 \xff`},
		{"\ufffd", "\ufffd", "\ufffd"},
	} {
		if got := Text(c.in); got != c.text {
			t.Errorf("Text(%q) is %q, want %q", c.in, got, c.text)
		}
		if got := Line(c.in); got != c.line {
			t.Errorf("Line(%q) is %q, want %q", c.in, got, c.line)
		}
	}
}

func TestMessages(t *testing.T) {
	const bad = "\x1b[1mx\xff"
	m := &migratedv1.ListResponse{Migrations: []*migratedv1.Migration{
		{VmName: bad, Error: &migratedv1.MigrationError{Message: bad}, Spec: &migratedv1.MigrationSpec{Vm: "/run/vm"}},
	}}
	if _, err := proto.Marshal(m); err == nil {
		t.Fatal("it can be marshalled as it is")
	}
	Valid(m)
	if _, err := proto.Marshal(m); err != nil {
		t.Error(err)
	}
	Message(m)
	got := m.GetMigrations()[0]
	if want := `\x1b[1mx\xff`; got.GetVmName() != want || got.GetError().GetMessage() != want ||
		got.GetSpec().GetVm() != "/run/vm" {
		t.Errorf("%v", got)
	}
	sources := &migratedv1.SourceMachine{CommandLine: []string{"qemu", bad}}
	if Message(sources); sources.GetCommandLine()[1] != `\x1b[1mx\xff` || sources.GetCommandLine()[0] != "qemu" {
		t.Errorf("a list: %q", sources.GetCommandLine())
	}
}

// SPDX-License-Identifier: Apache-2.0

package devicestate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// section returns a section as QEMU writes it.
func section(id uint32, name string, instance uint32, content string) []byte {
	b := binary.BigEndian.AppendUint32([]byte{sectionFull}, id)
	b = append(append(b, byte(len(name))), name...)
	b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, instance), 1)
	b = append(append(b, content...), sectionFooter)
	return binary.BigEndian.AppendUint32(b, id)
}

func saved(sections ...[]byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte(magic), version)
	return append(append(b, bytes.Join(sections, nil)...), sectionEnd)
}

func TestParse(t *testing.T) {
	// A device's own data may look like its footer, followed by the beginning of a header.
	lookalike := "a\x7e\x00\x00\x00\x02\x04\x00\x00\x00\x03\x00b"
	parts := [][]byte{section(2, "timer", 0, lookalike), section(7, "0000:00:04.0/virtio-net", 0, ""),
		section(5, "cpu", 1, "\x00\x00")}
	sections, err := Parse(saved(parts...))
	if err != nil {
		t.Fatal(err)
	}
	want := []Section{{"timer", 0, 1, parts[0]}, {"0000:00:04.0/virtio-net", 0, 1, parts[1]}, {"cpu", 1, 1, parts[2]}}
	if diff := cmp.Diff(want, sections); diff != "" {
		t.Errorf("sections (-want +got):\n%s", diff)
	}
}

// forgeries are states in which the data of a device looks like its end, with other sections after it. victim is the
// device whose data the guest has chosen.
func forgeries() map[string][]byte {
	const victim = 9
	end := func(id uint32) string { return string(binary.BigEndian.AppendUint32([]byte{sectionFooter}, id)) }
	begin := func(id uint32, name string) string {
		s := string(section(id, name, 0, ""))
		return s[:len(s)-footer]
	}
	honest := section(2, "fw_cfg", 0, "real")
	forged := func(id uint32) string { return string(section(id, "fw_cfg", 0, "FAKE")) }
	return map[string][]byte{
		// The tail gets the id of the victim, so that its end is the victim's.
		"tail":       saved(honest, section(victim, "gpu", 0, "a"+end(victim)+forged(77)+begin(victim, "zz"))),
		"before":     saved(section(victim, "gpu", 0, end(victim)+forged(77)+begin(victim, "zz")), honest),
		"id in use":  saved(honest, section(victim, "gpu", 0, end(victim)+forged(2)+begin(victim, "zz"))),
		"same id":    saved(honest, section(victim, "gpu", 0, end(victim)+forged(victim)+begin(victim, "zz"))),
		"no forgery": saved(honest, section(victim, "gpu", 0, end(victim)+begin(victim, "zz"))),
		// The tail gets the id of a later section, and swallows the victim's end and the beginning of that section.
		"swallows the next": saved(honest, section(victim, "gpu", 0, end(victim)+forged(77)+begin(12, "zz")),
			section(12, "timer", 0, "abc"), section(13, "cpu", 0, "")),
		"swallows the last": saved(honest, section(victim, "gpu", 0, end(victim)+forged(77)+begin(13, "zz")),
			section(12, "timer", 0, "abc"), section(13, "cpu", 0, "")),
		// The victim's end is a part of a forged end and of the header after it, and so at a border of two sections.
		"across a border": saved(honest, section(4, "gpu", 0, end(4)+forged(77)+begin(0x7e000000, "zz")+"\x7e"),
			section(1, strings.Repeat("n", '!'), 0, end(0x04000000)+begin(1, "yy"))),
	}
}

// TestAmbiguous: no state is loaded early, and no change of one, where a guest may have made a section.
func TestAmbiguous(t *testing.T) {
	good := parsed(t, section(2, "fw_cfg", 0, "real"), section(9, "gpu", 0, ""))
	for name, state := range forgeries() {
		t.Run(name, func(t *testing.T) {
			sections, err := Parse(state)
			if err != nil {
				t.Fatal(err) // it would show nothing
			}
			if early, err := Early(sections); len(early) != 0 || !errors.Is(err, ErrAmbiguous) {
				t.Errorf("early %v, %v", early, err)
			}
			changes, err := Changes(good, sections, never)
			if changes != nil || !errors.Is(err, ErrOtherForm) || !errors.Is(err, ErrAmbiguous) {
				t.Errorf("changes %q, %v", changes, err)
			}
		})
	}
	if early, err := Early(good); err != nil || len(early) != 1 {
		t.Errorf("a state that is as it should be: %v, %v", early, err)
	}
}

// FuzzForgedSection: whatever a guest writes into the data of a device, Early returns QEMU's sections or none.
func FuzzForgedSection(f *testing.F) {
	for _, state := range forgeries() {
		f.Add(uint32(9), string(state[preamble:len(state)-1]), uint32(12))
	}
	f.Fuzz(func(t *testing.T, id uint32, chosen string, next uint32) {
		if id == next || id == 2 || next == 2 {
			return // QEMU gives no two devices the same
		}
		honest := section(2, "fw_cfg", 0, "real")
		sections, err := Parse(saved(section(id, "gpu", 0, chosen), honest, section(next, "timer", 0, chosen)))
		if err != nil {
			return
		}
		if early, err := Early(sections); err == nil && (len(early) != 1 || !bytes.Equal(early[0].Bytes, honest)) {
			t.Fatalf("early %+v", early)
		}
	})
}

func TestParseRefuses(t *testing.T) {
	good := saved(section(2, "timer", 0, "abc"))
	if _, err := Parse(good); err != nil {
		t.Fatal(err)
	}
	edit := func(offset int, value byte) []byte {
		b := bytes.Clone(good)
		b[offset] = value
		return b
	}
	for name, b := range map[string][]byte{
		"nothing":             nil,
		"no section, no end":  good[:preamble],
		"another magic":       edit(0, 'X'),
		"another version":     edit(7, 4),
		"a section of RAM":    edit(8, 1),
		"no name":             edit(13, 0),
		"a name that is none": edit(14, 7),
		"no footer":           edit(len(good)-6, 0),
		"a footer of another": edit(len(good)-2, 9),
		"no end":              good[:len(good)-1],
		"more than the end":   append(bytes.Clone(good), 0),
	} {
		if _, err := Parse(b); !errors.Is(err, ErrUnknown) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestStream(t *testing.T) {
	state := saved(section(2, "timer", 0, "abc"))
	got := append(Head("pc-q35-7.2"), Body(state)...)
	want := "QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x0apc-q35-7.2" + string(state[preamble:]) + "\x06\x00\x00\x00\x02{}"
	if string(got) != want {
		t.Errorf("stream %q, want %q", got, want)
	}
	sections, err := ParseBody(Body(state))
	if err != nil || len(sections) != 1 || sections[0].Name != "timer" {
		t.Errorf("sections %v, %v", sections, err)
	}
	if _, err := ParseBody(Body(state)[:9]); !errors.Is(err, ErrUnknown) {
		t.Errorf("half a body: %v", err)
	}
}

func TestCompare(t *testing.T) {
	parse := func(sections ...[]byte) []Section {
		s, err := Parse(saved(sections...))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a := parse(section(1, "same", 0, "x"), section(2, "changed", 0, "abc"), section(3, "changed", 1, "abc"),
		section(4, "gone", 0, "12"))
	b := parse(section(1, "same", 0, "x"), section(2, "changed", 0, "aXcd"), section(3, "changed", 1, "abc"),
		section(5, "new", 0, ""))
	want := []Difference{{"changed", 0, 8}, {"gone", 0, len(a[3].Bytes)}, {"new", 0, len(b[3].Bytes)}}
	got := Compare(a, b)
	// The longer content moves the footer, whose bytes may differ or not.
	if len(got) > 0 && got[0].Bytes > 1 {
		got[0].Bytes = 8
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("differences (-want +got):\n%s", diff)
	}
	if same := Compare(a, a); len(same) != 0 {
		t.Errorf("a state differs from itself: %v", same)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(saved(section(2, "timer", 0, "abc"), section(3, "cpu", 0, "\x7e\x00\x00\x00\x03")))
	f.Add(saved())
	f.Fuzz(func(t *testing.T, b []byte) {
		sections, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrUnknown) {
				t.Fatal(err)
			}
			return
		}
		var whole []byte
		for _, s := range sections {
			whole = append(whole, s.Bytes...)
		}
		if !bytes.Equal(whole, b[preamble:len(b)-1]) {
			t.Fatalf("the sections of %q are %q", b, whole)
		}
	})
}

// runState returns the section with the VM's run state.
func runState(state string) []byte {
	content := make([]byte, 4+100)
	binary.BigEndian.PutUint32(content, uint32(len(state)+1))
	copy(content[4:], state)
	return section(3, "globalstate", 0, string(content))
}

// TestBegun: Begun returns neither the end of a state before it is complete, nor a run state before Pause has changed
// it.
func TestBegun(t *testing.T) {
	whole := func(state string) []byte {
		return saved(section(2, "timer", 0, "abc"), runState(state), section(5, "cpu", 1, string(make([]byte, 200))))
	}
	state, body := whole("running"), Body(whole("paused"))
	for n := range len(state) + 1 {
		so := bytes.Clone(state[:n])
		Pause(so)
		begun, err := Begun(so)
		if err != nil || !bytes.HasPrefix(body, begun) || len(begun) != max(0, n-preamble-RunStateSize) {
			t.Fatalf("of %d bytes %d are begun: %v", n, len(begun), err)
		}
	}
	Pause(state)
	if !bytes.Equal(Body(state), body) {
		t.Error("the run state is another in the end")
	}
	if _, err := Begun([]byte("not a state of devices")); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
}

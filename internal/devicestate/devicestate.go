// SPDX-License-Identifier: Apache-2.0

// Package devicestate knows the envelope of a VM's device state: how QEMU writes it when it saves, and what an incoming
// migration wants around it. What devices put inside is opaque.
//
// QEMU saves (qemu_save_device_state in migration/savevm.c), all numbers in big endian:
//
//	"QEVM"  version 3
//	for each device with state, a section:
//	  04  section id (32)  length of name (8)  name  instance id (32)  version (32)    header
//	  what the device writes
//	  7e  section id (32)                                                              footer
//	00
//
// An incoming migration (qemu_loadvm_state) wants one thing between the version and the sections, and looks for another
// after the end:
//
//	07  length (32)  machine type              configuration: the resolved type, "pc-q35-7.2"
//	06  length (32)  JSON                      description: for debuggers; an empty object will do
//
// RAM is no section of it: it is moved page by page.
package devicestate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Most bounds the bytes of a device state that is saved, or taken from a source. That of 32 devices is 2 MB.
const Most = 256 << 20

const (
	magic   = "QEVM"
	version = 3

	sectionEnd         = 0x00
	sectionFull        = 0x04
	sectionDescription = 0x06
	sectionConfig      = 0x07
	sectionFooter      = 0x7e

	preamble = len(magic) + 4
	footer   = 1 + 4
)

// ErrUnknown says that QEMU has written something that is not described above.
var ErrUnknown = errors.New("the device state has a form that is not known")

// A Section is the state of one device.
type Section struct {
	Name     string // of the device: SaveStateEntry.idstr
	Instance uint32 // tells devices of one name apart
	Version  uint32
	Bytes    []byte // with header and footer; a part of what was parsed
}

// Parse takes what QEMU saved apart. The sections' Bytes, one after the other, are all that lies between version and
// end.
//
// Where a section ends only its device knows. But its footer is followed by the header of the next one, or by the end:
// five bytes and a header with a name in it, which no device writes by chance. Machine types older than 2.4 have no
// footers, and are refused.
func Parse(saved []byte) ([]Section, error) {
	if err := checkPreamble(saved); err != nil {
		return nil, err
	}
	var sections []Section
	rest := saved[preamble:]
	for len(rest) > 1 {
		s, size, err := parseSection(rest)
		if err != nil {
			return nil, fmt.Errorf("%w: section %d, at byte %d: %w", ErrUnknown, len(sections), len(saved)-len(rest), err)
		}
		sections, rest = append(sections, s), rest[size:]
	}
	if len(rest) != 1 || rest[0] != sectionEnd {
		return nil, fmt.Errorf("%w: it does not end with the end of a migration stream", ErrUnknown)
	}
	return sections, nil
}

func checkPreamble(saved []byte) error {
	if len(saved) <= preamble || string(saved[:len(magic)]) != magic {
		return fmt.Errorf("%w: it has %d bytes and does not begin with %q", ErrUnknown, len(saved), magic)
	}
	if v := binary.BigEndian.Uint32(saved[len(magic):]); v != version {
		return fmt.Errorf("%w: it is of version %d, not %d", ErrUnknown, v, version)
	}
	return nil
}

// parseSection reads the first of some sections that end with sectionEnd.
func parseSection(from []byte) (s Section, size int, err error) {
	header, err := s.parseHeader(from)
	if err != nil {
		return s, 0, err
	}
	mark := append([]byte{sectionFooter}, from[1:5]...)
	for at := header; ; {
		next := bytes.Index(from[at:], mark)
		if next < 0 {
			return s, 0, fmt.Errorf("%q has no end", s.Name)
		}
		end := at + next + footer
		if after := from[end:]; len(after) == 1 && after[0] == sectionEnd || isHeader(after) {
			s.Bytes = from[:end]
			return s, end, nil
		}
		at += next + 1
	}
}

// parseWhole takes one section, all of b.
func parseWhole(b []byte) (Section, error) {
	s, size, err := parseSection(append(b[:len(b):len(b)], sectionEnd))
	if err == nil && size != len(b) {
		err = fmt.Errorf("%d bytes follow section %q", len(b)-size, s.Name)
	}
	if err != nil {
		return s, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	s.Bytes = b
	return s, nil
}

func isHeader(b []byte) bool {
	var s Section
	_, err := s.parseHeader(b)
	return err == nil
}

// parseHeader reads the header of a section and returns its length.
func (s *Section) parseHeader(b []byte) (size int, err error) {
	const before = 1 + 4 + 1 // type, section id, length of the name
	if len(b) < before || b[0] != sectionFull {
		return 0, errors.New("no header of a section")
	}
	n := int(b[before-1])
	size = before + n + 4 + 4
	if n == 0 || len(b) < size {
		return 0, fmt.Errorf("a name of %d bytes, %d are left", n, len(b))
	}
	name := b[before : before+n]
	for _, c := range name {
		if c <= ' ' || c > '~' {
			return 0, fmt.Errorf("a name %q", name)
		}
	}
	s.Name = string(name)
	s.Instance, s.Version = binary.BigEndian.Uint32(b[before+n:]), binary.BigEndian.Uint32(b[before+n+4:])
	return size, nil
}

// beginning is that of whatever QEMU saves or loads.
func beginning() []byte { return binary.BigEndian.AppendUint32([]byte(magic), version) }

// Head is the beginning of a migration stream for a machine of that type, up to the first section.
func Head(machineType string) []byte {
	head := binary.BigEndian.AppendUint32(append(beginning(), sectionConfig), uint32(len(machineType)))
	return append(head, machineType...)
}

// description is an empty one.
var description = append(binary.BigEndian.AppendUint32([]byte{sectionDescription}, 2), "{}"...)

// Body is what follows the head of a migration stream: all that was saved, and the description.
func Body(saved []byte) []byte { return append(bytes.Clone(saved[preamble:]), description...) }

// End is the end of a body with such sections.
func End(sections []byte) []byte { return append(append(sections, sectionEnd), description...) }

// Join are all sections one after the other.
func Join(sections []Section) (joined []byte) {
	for _, s := range sections {
		joined = append(joined, s.Bytes...)
	}
	return joined
}

// Begun is the beginning of what Body will make of a state that QEMU is still writing, and has written so far, after
// Pause. The last bytes are not in it: they may be the end, which nobody is to see before QEMU has said that the state is
// whole, or a part of what Pause changes when it has all of it.
func Begun(saved []byte) ([]byte, error) {
	if len(saved) <= preamble {
		return nil, nil
	}
	return saved[preamble:max(preamble, len(saved)-RunStateSize)], checkPreamble(saved)
}

// ParseBody takes apart what Body has made, as Parse does.
func ParseBody(body []byte) ([]Section, error) {
	state, found := bytes.CutSuffix(body, description)
	if !found {
		return nil, fmt.Errorf("%w: it does not end with a description", ErrUnknown)
	}
	return Parse(append(beginning(), state...))
}

// Split takes apart what Join has made.
func Split(joined []byte) ([]Section, error) {
	return Parse(append(append(beginning(), joined...), sectionEnd))
}

// A key tells the sections of a state apart, of which several may have one name and instance.
type key struct {
	name     string
	instance uint32
	nth      int
}

// keysOf are the keys of all sections of a state.
func keysOf(sections []Section) []key {
	seen := make(map[key]int, len(sections))
	keys := make([]key, len(sections))
	for i, s := range sections {
		k := key{name: s.Name, instance: s.Instance}
		keys[i] = key{s.Name, s.Instance, seen[k]}
		seen[k]++
	}
	return keys
}

// A Difference is a device whose state is not the same in two device states.
type Difference struct {
	Name     string
	Instance uint32
	Bytes    int // that differ, at the same place; those that one has more than the other count
}

// Compare returns the devices whose state differs, in the order of a; those that only one has are counted whole.
func Compare(a, b []Section) (differences []Difference) {
	other := map[key][]byte{}
	for i, k := range keysOf(b) {
		other[k] = b[i].Bytes
	}
	for i, k := range keysOf(a) {
		if n := differ(a[i].Bytes, other[k]); n > 0 {
			differences = append(differences, Difference{k.name, k.instance, n})
		}
		delete(other, k)
	}
	for k, bytes := range other {
		differences = append(differences, Difference{k.name, k.instance, len(bytes)})
	}
	return differences
}

func differ(a, b []byte) (n int) {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			n++
		}
	}
	return n + max(len(a), len(b)) - min(len(a), len(b))
}

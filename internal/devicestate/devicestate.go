// SPDX-License-Identifier: Apache-2.0

// Package devicestate parses and makes the envelope of a VM's device state: the form in which QEMU saves it, and the
// form that an incoming migration expects. The content of the devices' sections is opaque.
//
// QEMU saves this (qemu_save_device_state in migration/savevm.c), all numbers in big endian:
//
//	"QEVM"  version 3
//	for each device with state, a section:
//	  04  section id (32)  length of name (8)  name  instance id (32)  version (32)    header
//	  the device's own data
//	  7e  section id (32)                                                              footer
//	00
//
// An incoming migration (qemu_loadvm_state) expects a configuration between the version and the sections, and a
// description after the end:
//
//	07  length (32)  machine type              configuration: the resolved type, "pc-q35-7.2"
//	06  length (32)  JSON                      description: for debuggers; an empty object is enough
//
// RAM is not among the sections: it is moved page by page.
package devicestate

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Most is the largest device state, in bytes, that is saved or accepted from a source. That of 32 devices has 2 MB.
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

// ErrUnknown says that a device state does not have the form above.
var ErrUnknown = errors.New("the device state has a form that is not known")

// A Section is the state of one device.
type Section struct {
	Name     string // the device's: SaveStateEntry.idstr
	Instance uint32 // distinguishes devices of the same name
	Version  uint32
	Bytes    []byte // with header and footer; a part of the parsed slice
}

// Parse splits what QEMU saved into sections. Their Bytes together are everything between the version and the end.
//
// A section has no length: only its device knows where it ends. Parse looks for its footer, five bytes, followed by the
// header of the next section or by the end. A header has a printable name, so that the data of a device does not look
// like this by chance. A guest that chooses data of its devices can make them look like this: see checkOneSplit.
// Machine types older than 2.4 have no footers, and are refused.
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

// checkPreamble checks magic and version.
func checkPreamble(saved []byte) error {
	if len(saved) <= preamble || string(saved[:len(magic)]) != magic {
		return fmt.Errorf("%w: it has %d bytes and does not begin with %q", ErrUnknown, len(saved), magic)
	}
	if v := binary.BigEndian.Uint32(saved[len(magic):]); v != version {
		return fmt.Errorf("%w: it is of version %d, not %d", ErrUnknown, v, version)
	}
	return nil
}

// parseSection reads the first section of from, which ends with sectionEnd.
func parseSection(from []byte) (s Section, size int, err error) {
	header, err := s.parseHeader(from)
	if err != nil {
		return s, 0, err
	}
	footerBytes := append([]byte{sectionFooter}, from[1:5]...)
	for offset := header; ; {
		next := bytes.Index(from[offset:], footerBytes)
		if next < 0 {
			return s, 0, fmt.Errorf("%q has no end", s.Name)
		}
		end := offset + next + footer
		if after := from[end:]; len(after) == 1 && after[0] == sectionEnd || isHeader(after) {
			s.Bytes = from[:end]
			return s, end, nil
		}
		offset += next + 1
	}
}

// parseWhole reads one section, which must be all of b.
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

// isHeader says whether b begins with the header of a section.
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

// ErrAmbiguous says that there is more than one way to split a device state into sections.
var ErrAmbiguous = errors.New("the device state can be read in more than one way")

// checkOneSplit returns ErrAmbiguous unless there is only one way to split a state into sections, which are these.
//
// A guest chooses a part of what some devices save, for example pictures of virtio-gpu. It can write the end of that
// device there, and sections of its own after it. But QEMU writes the true end of each device as well: the footer with
// its id, and then 04 or the end of the state. No two devices have the same id. So if the end of some section is not
// the true one, the first such section begins where it truly does, and has the true id, and the state has two ends with
// that id: the wrong one and the true one. If there is one end for each id, none is wrong. It does not matter where in
// the state the second one is, nor to what section it seems to belong, so all of the state is searched for all ids,
// also across the borders of sections. What follows 04 is not looked at: this must not depend on the form of a header.
func checkOneSplit(sections []Section) error {
	ends := make(map[uint32]int, len(sections))
	for i, s := range sections {
		for offset := 0; ; offset++ {
			next := bytes.IndexByte(s.Bytes[offset:], sectionFooter)
			if next < 0 {
				break
			}
			offset += next
			from := s.Bytes[offset:]
			if len(from) <= footer && i+1 < len(sections) {
				from = slices.Concat(from, sections[i+1].Bytes[:footer])
			}
			if len(from) == footer || len(from) > footer && from[footer] == sectionFull {
				ends[binary.BigEndian.Uint32(from[1:])]++
			}
		}
	}
	for _, s := range sections {
		if n := ends[binary.BigEndian.Uint32(s.Bytes[1:])]; n != 1 {
			return fmt.Errorf("%w: it has %d ends of %q, of which a guest has written all but one", ErrAmbiguous, n, s.Name)
		}
	}
	return nil
}

// preambleBytes returns magic and version, with which everything begins that QEMU saves or loads.
func preambleBytes() []byte { return binary.BigEndian.AppendUint32([]byte(magic), version) }

// Head returns the beginning of a migration stream for a machine of that type, up to the first section.
func Head(machineType string) []byte {
	head := binary.BigEndian.AppendUint32(append(preambleBytes(), sectionConfig), uint32(len(machineType)))
	return append(head, machineType...)
}

// description is the section of a description that is an empty object.
var description = append(binary.BigEndian.AppendUint32([]byte{sectionDescription}, 2), "{}"...)

// Body returns what follows the head of a migration stream: all sections that were saved, the end, and the description.
func Body(saved []byte) []byte { return append(bytes.Clone(saved[preamble:]), description...) }

// End turns joined sections into a body. It appends to sections.
func End(sections []byte) []byte { return append(append(sections, sectionEnd), description...) }

// Join returns the bytes of all sections, one after the other.
func Join(sections []Section) (joined []byte) {
	for _, s := range sections {
		joined = append(joined, s.Bytes...)
	}
	return joined
}

// Begun returns the beginning of a body while QEMU is still writing the state: saved is what it has written so far,
// after Pause. The last RunStateSize bytes are left out. They may have the end of the state, which must not be loaded
// before QEMU has said that it is complete, or a part of the section that Pause changes once all of it is there.
func Begun(saved []byte) ([]byte, error) {
	if len(saved) <= preamble {
		return nil, nil
	}
	return saved[preamble:max(preamble, len(saved)-RunStateSize)], checkPreamble(saved)
}

// ParseBody splits a body that Body has made, as Parse does.
func ParseBody(body []byte) ([]Section, error) {
	state, found := bytes.CutSuffix(body, description)
	if !found {
		return nil, fmt.Errorf("%w: it does not end with a description", ErrUnknown)
	}
	return Parse(append(preambleBytes(), state...))
}

// Split splits what Join has made.
func Split(joined []byte) ([]Section, error) {
	return Parse(append(append(preambleBytes(), joined...), sectionEnd))
}

// A key identifies a section of a state. Name and instance do not: several sections may have the same.
type key struct {
	name     string
	instance uint32
	nth      int // of those with this name and instance, from 0
}

// keysOf returns the keys of all sections of a state.
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
	Bytes    int // bytes that differ at the same offset, and those by which one state is longer
}

// Compare returns the devices whose state differs, in the order of a. Of a device that only one state has, all bytes
// count.
func Compare(a, b []Section) (differences []Difference) {
	other := map[key][]byte{}
	for i, k := range keysOf(b) {
		other[k] = b[i].Bytes
	}
	for i, k := range keysOf(a) {
		if n := countDifferences(a[i].Bytes, other[k]); n > 0 {
			differences = append(differences, Difference{k.name, k.instance, n})
		}
		delete(other, k)
	}
	for k, bytes := range other {
		differences = append(differences, Difference{k.name, k.instance, len(bytes)})
	}
	return differences
}

// countDifferences counts bytes as Difference.Bytes does.
func countDifferences(a, b []byte) (n int) {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			n++
		}
	}
	return n + max(len(a), len(b)) - min(len(a), len(b))
}

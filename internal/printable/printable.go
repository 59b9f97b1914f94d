// SPDX-License-Identifier: Apache-2.0

// Package printable escapes text from others for a protocol and for a terminal. The name of a VM, or the output of its
// QEMU, may have escape sequences that repaint an operator's screen, characters that reverse the direction of text, or
// bytes that are not UTF-8.
package printable

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Text returns s with all characters escaped that are not printable, as "\x1b" or "\u202e". Line feeds and tabs stay.
func Text(s string) string { return escape(s, "\n\t") }

// Line is Text that escapes line feeds and tabs as well.
func Line(s string) string { return escape(s, "") }

// escape escapes all characters that are not printable, but for those in kept.
func escape(s, kept string) string {
	clean := true
	for _, r := range s {
		clean = clean && r != utf8.RuneError && plain(r, kept)
	}
	if clean {
		return s
	}
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1, r < utf8.RuneSelf && !plain(r, kept):
			fmt.Fprintf(&b, `\x%02x`, s[0])
		case plain(r, kept):
			b.WriteString(s[:size])
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		s = s[size:]
	}
	return b.String()
}

func plain(r rune, kept string) bool { return unicode.IsPrint(r) || strings.ContainsRune(kept, r) }

// Message applies Text to all strings of a message, and of the messages in it.
func Message(m proto.Message) { each(m.ProtoReflect(), Text) }

// Valid makes all strings of a message valid UTF-8, which Protocol Buffers require. It applies Text to those that are
// not.
func Valid(m proto.Message) {
	each(m.ProtoReflect(), func(s string) string {
		if utf8.ValidString(s) {
			return s
		}
		return Text(s)
	})
}

// each replaces all strings of a message, also those in lists and maps, but not the keys of maps.
func each(m protoreflect.Message, replace func(string) string) {
	m.Range(func(field protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case field.IsList():
			list := v.List()
			for i := range list.Len() {
				if is, changed := value(field, list.Get(i), replace); changed {
					list.Set(i, is)
				}
			}
		case field.IsMap():
			v.Map().Range(func(k protoreflect.MapKey, of protoreflect.Value) bool {
				if is, changed := value(field.MapValue(), of, replace); changed {
					v.Map().Set(k, is)
				}
				return true
			})
		default:
			if is, changed := value(field, v, replace); changed {
				m.Set(field, is)
			}
		}
		return true
	})
}

// value replaces the strings in one value. It returns the new value, and whether the caller has to set it.
func value(
	field protoreflect.FieldDescriptor, v protoreflect.Value, replace func(string) string,
) (is protoreflect.Value, changed bool) {
	switch field.Kind() {
	case protoreflect.StringKind:
		text := v.String()
		became := replace(text)
		return protoreflect.ValueOfString(became), became != text
	case protoreflect.MessageKind, protoreflect.GroupKind:
		each(v.Message(), replace)
	}
	return v, false
}

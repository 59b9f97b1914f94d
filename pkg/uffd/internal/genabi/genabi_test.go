// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestGenerate(t *testing.T) {
	const in = `
#ifndef _X_H
#define _X_H
#include <linux/types.h>
/* LATER is used before it is defined */
#define MANY (ONE | LATER |	\
	      (__u64)1 << 63)
#define ONE (1<<0)  /* a comment */
#define LATER 0x10
#define _NR (0x03)
#define CMD _IOWR(0xAA, _NR, struct outer)
#define PLAIN _IO(0xAA, 0x00)
#define LETTER _IO('f', 0x00)
struct inner { __u64 a; __u64 b_c; };
struct outer { struct inner range; __s64 res; };
struct msg {
	__u8 event; __u8 r1; __u16 r2; __u32 r3;
	union { struct { __u64 flags; } fault; struct { __u32 ufd; } fork; } arg;
} __attribute__((packed));
#endif
`
	out, err := generate(in, "x.h", "abi")
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(string(out)), " ")
	for _, want := range []string{
		"MANY = 0x8000000000000011 ", "ONE = 0x1 ", "Nr_NR = 0x3 ",
		"CMD = 0xc018aa03 ", "PLAIN = 0xaa00 ", "LETTER = 0x6600 ",
		"type Inner struct { A uint64 // offset 0 BC uint64 // offset 8 }",
		"type Outer struct { Range Inner // offset 0 Res int64 // offset 16 }",
		"Sizeof_msg = 16 ", "Offsetof_msg_r3 = 4 ", "Offsetof_msg_arg_fault_flags = 8 ", "Offsetof_msg_arg_fork_ufd = 8 ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	if again, err := generate(in, "x.h", "abi"); err != nil || !bytes.Equal(again, out) {
		t.Error("the second run differs from the first")
	}
}

func TestSection(t *testing.T) {
	const text = "#define A 1\n#define B 2\nstruct s { __u64 b; };\n/* the end of B */\n#define C 3\n"
	for _, tt := range []struct{ from, until, want, err string }{
		{"", "", text, ""},
		{"B 2", "", text[len("#define A 1\n"):], ""},
		{"B 2", "the end", "#define B 2\nstruct s { __u64 b; };\n", ""},
		{"B 2", "B", "#define B 2\nstruct s { __u64 b; };\n", ""}, // not its own line
		{"D", "", "", `no line has "D"`},
		{"C 3", "B", "", `no line after that with "C 3" has "B"`},
	} {
		got, err := section(text, tt.from, tt.until)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
			t.Errorf("from %q until %q: %q, %v; want %q, %s", tt.from, tt.until, got, err, tt.want, tt.err)
		}
	}
}

// TestRefuse checks that the generator names what it does not understand, and does not guess.
func TestRefuse(t *testing.T) {
	for name, tt := range map[string]struct{ in, want string }{
		"macro with arguments": {"#define F(x) x\n", "F: macros with arguments"},
		"undefined name":       {"#define A B\n", "B is not defined"},
		"cycle":                {"#define A B\n#define B A\n", "refers to itself"},
		"operator":             {"#define A 1 + 2\n", "left over"},
		"character":            {"#define A '\xff'\n", "not understood"},
		"conditional":          {"#ifdef X\n#endif\n", "directive not understood"},
		"type":                 {"struct a { int b; };\n", `type "int"`},
		"padding":              {"struct a { __u8 b; __u64 c; };\n", "padding"},
		"unknown struct":       {"struct a { struct b c; };\n", "before it is declared"},
		"ioctl of unknown":     {"#define A _IOR(1, 2, struct b)\n", "struct b is not declared"},
		"empty struct":         {"struct a { };\n", "empty"},
		"cut off":              {"struct a { __u64 b;\n", "not understood"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := generate(tt.in, "x.h", "abi")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// The encoding of ioctl numbers (include/uapi/asm-generic/ioctl.h): direction, size of the
// argument, type and number. A few architectures (powerpc, mips, sparc, alpha) encode them differently; the
// emitted file is not built there.
const (
	iocNRShift, iocTypeShift, iocSizeShift, iocDirShift = 0, 8, 16, 30

	iocNone, iocWrite, iocRead = 0, 1, 2
)

var directions = map[string]uint64{"_IO": iocNone, "_IOW": iocWrite, "_IOR": iocRead, "_IOWR": iocRead | iocWrite}

var exprToken = regexp.MustCompile(`^\s*(<<|0[xX][0-9a-fA-F]+|\d+|\w+|'[^'\\]'|[()|,])`)

// evalAll evaluates every macro.
func (h *header) evalAll() error {
	for _, m := range h.macros {
		if _, err := h.valueOf(m.name, 0); err != nil {
			return err
		}
	}
	return nil
}

// valueOf evaluates the macro called name. depth limits macros that refer to themselves.
func (h *header) valueOf(name string, depth int) (uint64, error) {
	m := h.byName[name]
	if m == nil {
		return 0, fmt.Errorf("%s is not defined", name)
	}
	if m.done {
		return m.value, nil
	}
	if depth > len(h.macros) {
		return 0, fmt.Errorf("%s refers to itself", name)
	}
	e := &expr{h: h, rest: m.body, depth: depth}
	v, err := e.or()
	if err == nil && strings.TrimSpace(e.rest) != "" {
		err = fmt.Errorf("%q is left over", e.rest)
	}
	if err != nil {
		return 0, fmt.Errorf("%s = %q: %w", name, m.body, err)
	}
	m.value, m.done = v, true
	return v, nil
}

// expr evaluates the C that the macros use, from the loosest operator to the tightest:
//
//	or    = shift { "|" shift }
//	shift = unary { "<<" unary }
//	unary = [ "(__u64)" ] ( number | 'c' | name | "(" or ")" | _IO…( or "," or [ "," "struct" name ] ) )
type expr struct {
	h     *header
	rest  string
	depth int
}

func (e *expr) peek() string {
	m := exprToken.FindStringSubmatch(e.rest)
	if m == nil {
		return ""
	}
	return m[1]
}

func (e *expr) next() string {
	m := exprToken.FindStringSubmatch(e.rest)
	if m == nil {
		return ""
	}
	e.rest = e.rest[len(m[0]):]
	return m[1]
}

func (e *expr) expect(want string) error {
	if got := e.next(); got != want {
		return fmt.Errorf("expected %q, found %q", want, got)
	}
	return nil
}

func (e *expr) or() (uint64, error) {
	v, err := e.shift()
	for err == nil && e.peek() == "|" {
		e.next()
		var r uint64
		r, err = e.shift()
		v |= r
	}
	return v, err
}

func (e *expr) shift() (uint64, error) {
	v, err := e.unary()
	for err == nil && e.peek() == "<<" {
		e.next()
		var r uint64
		r, err = e.unary()
		v <<= r
	}
	return v, err
}

func (e *expr) unary() (uint64, error) {
	t := e.next()
	switch {
	case t == "(" && e.peek() == "__u64":
		e.next()
		if err := e.expect(")"); err != nil {
			return 0, err
		}
		return e.unary()
	case t == "(":
		v, err := e.or()
		if err != nil {
			return 0, err
		}
		return v, e.expect(")")
	case t == "":
		return 0, fmt.Errorf("cannot read %q", e.rest)
	case t[0] == '\'': // one byte of ASCII: in C a higher byte may be negative
		if t[1] > 0x7f {
			return 0, fmt.Errorf("character %s is not understood", t)
		}
		return uint64(t[1]), nil
	case t[0] >= '0' && t[0] <= '9':
		return strconv.ParseUint(t, 0, 64)
	}
	if dir, ok := directions[t]; ok {
		return e.ioctl(dir)
	}
	return e.h.valueOf(t, e.depth+1)
}

// ioctl evaluates the arguments of _IO, _IOR, _IOW or _IOWR.
func (e *expr) ioctl(dir uint64) (uint64, error) {
	if err := e.expect("("); err != nil {
		return 0, err
	}
	typ, err := e.or()
	if err != nil {
		return 0, err
	}
	if err := e.expect(","); err != nil {
		return 0, err
	}
	nr, err := e.or()
	if err != nil {
		return 0, err
	}
	var size uint64
	if dir != iocNone {
		if err := e.expect(","); err != nil {
			return 0, err
		}
		if err := e.expect("struct"); err != nil {
			return 0, err
		}
		name := e.next()
		r := e.h.records[name]
		if r == nil {
			return 0, fmt.Errorf("struct %s is not declared", name)
		}
		size = uint64(r.size)
	}
	return dir<<iocDirShift | size<<iocSizeShift | typ<<iocTypeShift | nr<<iocNRShift, e.expect(")")
}

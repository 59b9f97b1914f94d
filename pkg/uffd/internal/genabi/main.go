// SPDX-License-Identifier: Apache-2.0

// Command genabi writes the Go form of a kernel header: every constant that the header defines,
// with its value, and every struct, with the offsets of its fields.
//
//	genabi -in userfaultfd.h -out zabi_linux.go -package abi
//
// It reads the header and nothing else (no compiler, no other header), so that anybody can check that
// the committed output is what the header says. It knows the part of C which
// include/uapi/linux/userfaultfd.h uses and refuses everything else by name, rather than guessing.
//
// Order of work: [clean] the text, [parse] declarations, [layout] the structs by the C rules
// for 64-bit Linux, [eval] the macros, [emit] Go.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	in := flag.String("in", "", "kernel header to read")
	out := flag.String("out", "", "Go file to write")
	pkg := flag.String("package", "abi", "name of the Go package")
	flag.Parse()
	if err := run(*in, *out, *pkg); err != nil {
		fmt.Fprintln(os.Stderr, "genabi:", err)
		os.Exit(1)
	}
}

func run(in, out, pkg string) error {
	text, err := os.ReadFile(in)
	if err != nil {
		return err
	}
	src, err := generate(string(text), filepath.Base(in), pkg)
	if err != nil {
		return fmt.Errorf("%s: %w", in, err)
	}
	return os.WriteFile(out, src, 0o644)
}

// generate is the whole generator as a function of the header's text.
func generate(text, name, pkg string) ([]byte, error) {
	h, err := parse(clean(text))
	if err != nil {
		return nil, err
	}
	if err := h.layout(); err != nil {
		return nil, err
	}
	if err := h.evalAll(); err != nil {
		return nil, err
	}
	return emit(h, name, pkg)
}

// SPDX-License-Identifier: Apache-2.0

// Command genabi writes the Go form of a kernel header: every constant that the header defines,
// with its value, and every struct, with the offsets of its fields.
//
//	genabi -in userfaultfd.h -out zabi_linux.go -package abi
//	genabi -in fs.h -from PROCFS_IOCTL_MAGIC -until '/proc/<pid>/maps' -out zpagemap_linux.go -package abi
//
// It reads only the header (no compiler, no other header), so that anybody can check the committed
// output against the header. It knows the part of C that include/uapi/linux/userfaultfd.h uses. It does
// not guess: it refuses everything else and names it. -from and -until choose lines of a header that has much
// else.
//
// Order of work: [section] and [clean] the text, [parse] declarations, [layout] the structs by the C rules
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
	from := flag.String("from", "", "begin with the first line that has this text")
	until := flag.String("until", "", "end before the first line after that which has this text")
	flag.Parse()
	if err := run(*in, *out, *pkg, *from, *until); err != nil {
		fmt.Fprintln(os.Stderr, "genabi:", err)
		os.Exit(1)
	}
}

func run(in, out, pkg, from, until string) error {
	text, err := os.ReadFile(in)
	if err != nil {
		return err
	}
	part, err := section(string(text), from, until)
	if err != nil {
		return fmt.Errorf("%s: %w", in, err)
	}
	src, err := generate(part, filepath.Base(in), pkg)
	if err != nil {
		return fmt.Errorf("%s: %w", in, err)
	}
	return os.WriteFile(out, src, 0o644)
}

// generate returns the Go file for the text of a header, or of a section of it.
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

// SPDX-License-Identifier: Apache-2.0

// Command guest is PID 1 of a kernel whose RWP and PAGEMAP_SCAN are examined. Its arguments say which parts it runs:
//
//	support   what the program finds out about the kernel, and how it names what is missing
//	tests     the tests of pkg/uffd
//	vcpu      what the kernel says of pages that a virtual CPU of KVM's has touched
//	measure   the cost of a scan, and of a page that is touched, of a QEMU's RAM (measure.go)
//
// It reports
//
//	RESULT name outcome
//	LOG anything
//	DONE
//
// On a machine that is already booted, 'guest measure' measures that machine, as root.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd"
)

// patience bounds the whole run. Nothing waits that long unless it is broken.
const patience = 10 * time.Minute

func main() {
	booted := os.Getpid() == 1
	err := run(booted)
	if err != nil {
		fmt.Println("LOG failed:", err)
	} else {
		fmt.Println("DONE")
	}
	if booted {
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) // it does not return
	}
	if err != nil {
		os.Exit(1)
	}
}

func run(booted bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if booted {
		if err := mount(); err != nil {
			return err
		}
	}
	for _, name := range os.Args[1:] {
		part := map[string]func(context.Context) error{
			"support": support, "tests": tests, "vcpu": vcpu, "measure": measure,
		}[name]
		if part == nil {
			return fmt.Errorf("there is no part %q", name)
		}
		if err := part(ctx); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// mount mounts what a booted system has.
func mount() error {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/tmp"},
	} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return errors.Join(os.Setenv("PATH", "/usr/bin"), os.Setenv("TMPDIR", "/tmp"))
}

// support reports the answer to each way to ask for a feature: "has it", or what is missing and which release has it.
func support(context.Context) error {
	_, scanErr := scanOne()
	for name, err := range map[string]error{
		"features":   uffd.HaveFeatures(uffd.FeatureRWP | uffd.FeatureRWPAsync),
		"handshake":  handshake(),
		"categories": uffd.HaveCategories(uffd.PagePresent | uffd.PageAccessed),
		"scan":       scanErr,
	} {
		outcome := "has it"
		var missing *uffd.NotSupportedError
		switch {
		case errors.As(err, &missing):
			outcome = missing.Feature + " needs " + missing.MinKernel
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Println("RESULT", name, outcome)
	}
	return nil
}

// handshake asks for RWP on a descriptor.
func handshake() error {
	u, err := uffd.Open(uffd.OpenOptions{})
	if err != nil {
		return err
	}
	defer u.Close()
	_, _, err = u.API(uffd.FeatureRWP)
	return err
}

// scanOne looks for pages of this process.
func scanOne() (int, error) {
	p, err := uffd.OpenPagemap(os.Getpid())
	if err != nil {
		return 0, err
	}
	defer p.Close()
	n, _, err := p.Scan(uffd.Range{Len: 1 << 46}, uffd.PageQuery{All: uffd.PagePresent}, make([]uffd.PageRegion, 1))
	if err == nil && n == 0 {
		err = errors.New("a process without a page")
	}
	return n, err
}

// tests runs the compiled tests of pkg/uffd, and reports the outcome of each test and subtest.
func tests(ctx context.Context) error {
	const program = "/tests/uffd.test"
	cmd := exec.CommandContext(ctx, program, "-test.v")
	cmd.Dir = filepath.Dir(program)
	cmd.Env = append(os.Environ(), "HOME=/tmp", "UFFDTEST_CHILD="+cmd.Dir+"/child")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := lines.Text()
		fmt.Println("LOG", line)
		// "--- PASS: TestCopy/anon (0.01s)"
		if words := strings.Fields(line); len(words) == 4 && words[0] == "---" {
			fmt.Println("RESULT", words[2], strings.TrimSuffix(words[1], ":"))
		}
	}
	return errors.Join(lines.Err(), cmd.Wait())
}

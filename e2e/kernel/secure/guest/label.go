// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// categories are the VM's own pair, as libvirt gives each VM one.
const categories = "s0:c1,c2"

// Domains.
const (
	daemonDomain   = "system_r:migrated_t:s0"
	qemuDomain     = "system_r:svirt_t:" + categories
	strangerDomain = "system_r:stranger_t:s0"
)

func fullContext(short string) string { return "system_u:" + short }

// label labels a file. It does not follow symbolic links.
func label(path, short string) error {
	if err := unix.Lsetxattr(path, "security.selinux", []byte(fullContext(short)), 0); err != nil {
		return fmt.Errorf("label %s %s: %w", path, short, err)
	}
	return nil
}

// labels are for files that neither the kernel nor the policy labels by itself. A directory's label is for everything
// in it except what the list names later.
var labels = []struct{ path, short string }{
	{"/lib", "object_r:lib_t:s0"},
	{"/lib64", "object_r:lib_t:s0"},
	{"/usr/share", "object_r:usr_t:s0"},
	{"/usr/bin", "object_r:bin_t:s0"},
	{"/usr/bin/migrated", "object_r:migrated_exec_t:s0"},
	{"/usr/bin/qemu-system-x86_64", "object_r:qemu_exec_t:s0"},
	{watchedQEMU, "object_r:qemu_exec_t:s0"},
	{"/usr/bin/probe", "object_r:other_exec_t:s0"},
	{"/usr/bin/probe-qemu", "object_r:qemu_exec_t:s0"},
	{"/etc", "object_r:etc_t:s0"},
	{"/var", "object_r:var_t:s0"},
	{"/dev/kvm", "object_r:kvm_device_t:s0"},
	{"/dev/userfaultfd", "object_r:migrated_uffd_device_t:s0"},
	{"/dev/null", "object_r:null_device_t:s0"},
	{"/dev/zero", "object_r:zero_device_t:s0"},
	{"/dev/random", "object_r:urandom_device_t:s0"},
	{"/dev/urandom", "object_r:urandom_device_t:s0"},
}

// enforce loads the policy, labels all files and makes the policy enforced.
func enforce() error {
	if err := loadPolicy("base"); err != nil {
		return err
	}
	for _, l := range labels {
		err := filepath.WalkDir(l.path, func(path string, _ fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return label(path, l.short)
		})
		if err != nil {
			return err
		}
	}
	return os.WriteFile("/sys/fs/selinux/enforce", []byte("1"), 0)
}

// loadPolicy loads one of the variants that were compiled outside, in place of the present one.
func loadPolicy(name string) error {
	policy, err := os.ReadFile("/policy/" + name)
	if err != nil {
		return err
	}
	if err := os.WriteFile("/sys/fs/selinux/load", policy, 0); err != nil { // it must be one write
		return fmt.Errorf("load policy %s: %w", name, err)
	}
	return nil
}

// domainOf returns the domain of a process, without the user.
func domainOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", pid))
	if err != nil {
		return err.Error()
	}
	_, short, _ := strings.Cut(strings.TrimRight(string(text), "\x00\n"), ":")
	return short
}

// shown returns what is reported of a descriptor's label. If libvirt chose the categories of the host's QEMU, that is
// whether the descriptor has the same ones.
func (h *host) shown(label string) string {
	_, level, _ := strings.Cut(domainOf(h.qemu()), "svirt_t:")
	if h.libvirt && label == fullContext("object_r:migrated_uffd_t:"+level) && strings.Contains(level, ":c") {
		return "its-domain's"
	}
	return label
}

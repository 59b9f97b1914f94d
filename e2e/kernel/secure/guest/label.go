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

// categories are the VM's own, as libvirt gives each VM a pair.
const categories = "s0:c1,c2"

// Domains.
const (
	daemonDomain   = "system_r:migrated_t:s0"
	qemuDomain     = "system_r:svirt_t:" + categories
	otherQEMU      = "system_r:svirt_t:s0:c3"
	strangerDomain = "system_r:stranger_t:s0"
)

func fullContext(short string) string { return "system_u:" + short }

// label labels a file, not what a symbolic link leads to.
func label(path, short string) error {
	if err := unix.Lsetxattr(path, "security.selinux", []byte(fullContext(short)), 0); err != nil {
		return fmt.Errorf("label %s %s: %w", path, short, err)
	}
	return nil
}

// labels are of what neither the kernel nor the policy labels by itself. A
// directory's is for all in it but what follows.
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

// enforce loads the policy, labels all files and makes the policy hold.
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

// loadPolicy loads one of the variants that the host compiled, instead of
// what is loaded.
func loadPolicy(name string) error {
	policy, err := os.ReadFile("/policy/" + name)
	if err != nil {
		return err
	}
	if err := os.WriteFile("/sys/fs/selinux/load", policy, 0); err != nil { // one write, as it must be
		return fmt.Errorf("load policy %s: %w", name, err)
	}
	return nil
}

// domainOf is the domain of a process, without the user.
func domainOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", pid))
	if err != nil {
		return err.Error()
	}
	_, short, _ := strings.Cut(strings.TrimRight(string(text), "\x00\n"), ":")
	return short
}

// shown is what is reported of a descriptor's label: where libvirt chose the categories of the host's QEMU, whether they
// are the descriptor's.
func (h *host) shown(label string) string {
	_, level, _ := strings.Cut(domainOf(h.qemu()), "svirt_t:")
	if h.libvirt && label == fullContext("object_r:migrated_uffd_t:"+level) && strings.Contains(level, ":c") {
		return "its-domain's"
	}
	return label
}

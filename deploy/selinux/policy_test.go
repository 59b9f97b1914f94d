// SPDX-License-Identifier: Apache-2.0

// Package selinux_test compiles the module against Debian's reference policy and against the small one of the
// end-to-end test, asks what follows, breaks each neverallow rule once, and lets a booted kernel enforce the result.
package selinux_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestOnDebian holds what README.md says of Debian's policy: the module compiles against all of it with every
// neverallow rule checked, and these are all rules about what it protects.
func TestOnDebian(t *testing.T) {
	policy := mustCompile(t, slices.Concat(referencePolicy(t), moduleFiles(t)))
	for _, test := range []struct {
		name  string
		query []string // of sesearch
		want  []string // every rule that answers it, or its start where it ends in "..."
	}{
		{
			"a VM's descriptor: QEMU makes it, the daemon has it, nobody else anything",
			[]string{"-A", "-t", "migrated_uffd_t"},
			[]string{
				"allow migrated_qemu_domain migrated_uffd_t:anon_inode create;",
				"allow migrated_t migrated_uffd_t:anon_inode { create getattr ioctl read };",
				"allowxperm migrated_t migrated_uffd_t:anon_inode ioctl { 0xaa00-0xaa04 0xaa07-0xaa08 0xaa3f };",
			},
		},
		{
			"the daemon's own descriptor",
			[]string{"-A", "-t", "migrated_probe_t"},
			[]string{
				"allow migrated_t migrated_probe_t:anon_inode { create getattr ioctl };",
				"allowxperm migrated_t migrated_probe_t:anon_inode ioctl 0xaa3f;",
			},
		},
		{
			"what a QEMU makes is labelled",
			[]string{"-T", "-s", "svirt_t", "-c", "anon_inode"},
			[]string{"type_transition svirt_t svirt_t:anon_inode migrated_uffd_t [userfaultfd];"},
		},
		{
			"QEMU and the device",
			[]string{"-A", "-s", "svirt_t", "-t", "migrated_uffd_device_t"},
			[]string{
				"allow migrated_qemu_domain migrated_uffd_device_t:chr_file { ioctl read write };",
				"allowxperm migrated_qemu_domain migrated_uffd_device_t:chr_file ioctl 0xaa00;",
			},
		},
		{
			"who may trace a QEMU: those who could before, and the daemon",
			[]string{"-A", "-t", "svirt_t", "-c", "process", "-p", "ptrace"},
			[]string{
				"allow livecd_t domain:process ptrace;",
				"allow migrated_t migrated_qemu_domain:process { getattr ptrace rlimitinh siginh sigkill signull transition };",
				"allow sysadm_t domain:process ptrace; [ allow_ptrace ]:True",
				"allow sysadm_t virt_domain:process { getattr ptrace ...",
				"allow unconfined_domain_type domain:process { ...",
			},
		},
		{
			"who may trace the daemon: those who may trace everybody",
			[]string{"-A", "-t", "migrated_t", "-c", "process", "-p", "ptrace"},
			[]string{
				"allow livecd_t domain:process ptrace;",
				"allow sysadm_t domain:process ptrace; [ allow_ptrace ]:True",
				"allow unconfined_domain_type domain:process { ...",
			},
		},
		{
			"who becomes the daemon",
			[]string{"-A", "-t", "migrated_t", "-c", "process", "-p", "transition,dyntransition"},
			[]string{"allow init_t migrated_t:process { rlimitinh siginh transition };"},
		},
		{
			"what the daemon becomes",
			[]string{"-A", "-s", "migrated_t", "-c", "process", "-p", "transition,dyntransition"},
			[]string{
				"allow migrated_t migrated_qemu_domain:process " +
					"{ getattr ptrace rlimitinh siginh sigkill signull transition };",
			},
		},
		{
			"who may use descriptors of the daemon",
			[]string{"-A", "-t", "migrated_t", "-c", "fd"},
			[]string{
				"allow init_t migrated_t:fd use;",
				"allow migrated_qemu_domain migrated_t:fd use;",
				"allow unconfined_domain_type domain:fd use;",
			},
		},
		{
			"who reaches the port, which svirt_t would if it were one of all ports",
			[]string{"-A", "-t", "migrated_port_t", "-c", "tcp_socket"},
			[]string{"allow migrated_t migrated_port_t:tcp_socket { name_bind name_connect };"},
		},
		{
			"what the daemon has of root's powers",
			[]string{"-A", "-s", "migrated_t", "-c", "capability,capability2"},
			[]string{
				"allow migrated_t migrated_t:capability { chown dac_override dac_read_search kill lease net_admin " +
					"setgid setpcap setuid sys_ptrace };",
				"allow migrated_t migrated_t:capability2 checkpoint_restore;",
			},
		},
		{
			"which files the daemon writes",
			[]string{"-A", "-s", "migrated_t", "-c", "file", "-p", "write,append,create,unlink,rename"},
			[]string{
				"allow migrated_t migrated_log_t:file { append create getattr open read rename setattr unlink write };",
				"allow migrated_t migrated_qemu_tmpfs:file { lock unlink };",
				"allow migrated_t migrated_record_t:file " +
					"{ create getattr lock map open read rename setattr unlink write };",
				"allow migrated_t migrated_state_t:file { getattr lock open read write };",
				"allow migrated_t migrated_t:file { append getattr ioctl lock open read write };", // its own /proc/PID
			},
		},
		{
			"whose files the daemon gives away",
			[]string{"-A", "-s", "migrated_t", "-c", "file", "-p", "setattr"},
			[]string{
				"allow migrated_t migrated_image:file { getattr setattr };",
				"allow migrated_t migrated_log_t:file { append create getattr open read rename setattr unlink write };",
				"allow migrated_t migrated_record_t:file " +
					"{ create getattr lock map open read rename setattr unlink write };",
			},
		},
		{
			"how the daemon reaches libvirt",
			[]string{"-A", "-s", "migrated_t", "-t", "virtd_t", "-c", "unix_stream_socket"},
			[]string{"allow migrated_t virtd_t:unix_stream_socket connectto;"},
		},
		{
			"the state of a VM's devices, and the lock of one: the daemon and QEMU, nobody else anything",
			[]string{"-A", "-t", "migrated_state_t"},
			[]string{
				"allow migrated_qemu_domain migrated_state_t:file { getattr lock open read write };",
				"allow migrated_t migrated_state_t:file { getattr lock open read write };",
			},
		},
		{
			"what the daemon makes on tmpfs, or in memory, is labelled",
			[]string{"-T", "-s", "migrated_t", "-t", "tmpfs_t"},
			[]string{"type_transition migrated_t tmpfs_t:file migrated_state_t;"},
		},
		{
			"memory that is QEMU's own: the daemon reads it, and asks which pages have content",
			[]string{"-A", "-s", "migrated_t", "-t", "svirt_t", "-c", "file"},
			[]string{
				"allow migrated_t migrated_qemu_domain:file { getattr ioctl open read };",
				"allowxperm migrated_t migrated_qemu_domain:file ioctl 0x6610;",
			},
		},
		{
			"whose mappings the daemon reads, besides QEMUs'",
			[]string{"-A", "-s", "migrated_t", "-t", "openvswitch_t", "-c", "file"},
			[]string{"allow migrated_t migrated_sharing_domain:file { getattr open read };"},
		},
		{
			"memory in files: the daemon reads it, and removes the file when nobody needs it any more",
			[]string{"-A", "-s", "migrated_t", "-t", "svirt_tmpfs_t", "-c", "file"},
			[]string{
				"allow migrated_t migrated_qemu_ram:file { getattr open read };",
				"allow migrated_t migrated_qemu_tmpfs:file { lock unlink };",
			},
		},
		{
			"which programs the daemon runs, all of them in another domain",
			[]string{"-T", "-s", "migrated_t", "-c", "process"},
			[]string{"type_transition migrated_t qemu_exec_t:process svirt_t;"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got := search(t, policy, test.query...)
			for i, rule := range got {
				if i < len(test.want) {
					if start, cut := strings.CutSuffix(test.want[i], "..."); cut && strings.HasPrefix(rule, start) {
						got[i] = test.want[i]
					}
				}
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("sesearch %s (-want +got):\n%s", strings.Join(test.query, " "), diff)
			}
		})
	}
}

// TestOnBase: the module compiles with the policy of the end-to-end test, and both do without Debian's.
func TestOnBase(t *testing.T) {
	policy := mustCompile(t, append(moduleFiles(t), basePolicy))
	want := []string{
		"allow migrated_qemu_domain migrated_uffd_t:anon_inode create;",
		"allow migrated_t migrated_uffd_t:anon_inode { create getattr ioctl read };",
		"allowxperm migrated_t migrated_uffd_t:anon_inode ioctl { 0xaa00-0xaa04 0xaa07-0xaa08 0xaa3f };",
	}
	if diff := cmp.Diff(want, search(t, policy, "-A", "-t", "migrated_uffd_t")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

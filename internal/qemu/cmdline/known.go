// SPDX-License-Identifier: Apache-2.0

package cmdline

import (
	"fmt"
	"slices"
)

// flags are the options without a value in QEMU 2.12 to 11.1, also of other architectures (qemu-options.hx: those
// without HAS_ARG).
var flags = []string{
	"h", "help", "version", "S", "s", "daemonize", "snapshot", "nodefaults", "no-user-config", "nodefconfig",
	"nographic", "curses", "sdl", "no-frame", "alt-grab", "ctrl-grab", "no-quit", "full-screen", "portrait",
	"show-cursor", "usb", "win2k-hack", "no-fd-bootchk", "no-acpi", "no-hpet", "rtc-td-hack", "tdf", "localtime",
	"enable-kvm", "no-kvm", "no-kvm-irqchip", "no-kvm-pit", "no-kvm-pit-reinjection", "enable-hax",
	"singlestep", "one-insn-per-tb", "preconfig", "no-reboot", "no-shutdown", "only-migratable", "mem-prealloc",
	"old-param", "semihosting", "enable-fips", "enable-sync-profile", "xen-attach", "xen-create",
	"xen-domid-restrict", "audio-help", "virtfs_synth", "async-teardown", "perfmap", "jitdump",
}

// valued are the options that take the next argument as their value: those of QEMU 2.9 to 11.1 with HAS_ARG, and id and
// loadstate of Proxmox' QEMU.
var valued = []string{
	"accel", "acpitable", "action", "add-fd", "append", "audio", "audiodev", "balloon", "bios", "blockdev", "boot",
	"bootp", "bt", "cdrom", "chardev", "chroot", "clock", "compat", "cpu", "D", "d", "debugcon", "device",
	"dfilter", "display", "drive", "dtb", "dump-vmstate", "echr", "fda", "fdb", "fsdev", "fw_cfg", "g", "gdb",
	"global", "hda", "hdachs", "hdb", "hdc", "hdd", "icount", "id", "incoming", "initrd", "iscsi", "k", "kernel",
	"L", "loadstate", "loadvm", "M", "m", "machine", "mem-path", "mon", "monitor", "msg", "mtdblock", "name", "net",
	"netdev", "nic", "numa", "object", "option-rom", "overcommit", "parallel", "pflash", "pidfile", "plugin",
	"prom-env", "qmp", "qmp-pretty", "qtest", "qtest-log", "readconfig", "realtime", "redir", "rotate", "rtc",
	"run-with", "runas", "sandbox", "sd", "seed", "semihosting-config", "serial", "set", "shim", "smb", "smbios",
	"smp", "soundhw", "spice", "startdate", "tb-size", "tftp", "tpmdev", "trace", "usbdevice", "uuid", "vga",
	"virtfs", "virtioconsole", "vnc", "watchdog", "watchdog-action", "writeconfig", "xen-domid",
}

// checkKnown refuses an option that may or may not have a value. Taken wrongly, everything after it would be read
// otherwise than QEMU reads it, and a forbidden option would pass as a value.
func checkKnown(options []option) error {
	for _, o := range options {
		if o.bare && !slices.Contains(flags, o.name) {
			return fmt.Errorf("this version of migrated does not know QEMU's option -%s, "+
				"so it cannot tell whether the next argument is its value; "+
				"give a template of the destination's command line without that option, "+
				"or start the destination QEMU yourself and name its QMP socket", o.name)
		}
	}
	return nil
}

// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// deniedNumbers are some of deniedToQEMU: the number of the call, and arguments that have no effect if it is permitted.
var deniedNumbers = map[string][]uintptr{
	"kexec_load":      {unix.SYS_KEXEC_LOAD, 0, 1 << 30},
	"kexec_file_load": {unix.SYS_KEXEC_FILE_LOAD, ^uintptr(0), ^uintptr(0)}, "init_module": {unix.SYS_INIT_MODULE},
	"finit_module": {unix.SYS_FINIT_MODULE, ^uintptr(0)}, "delete_module": {unix.SYS_DELETE_MODULE},
	"mount": {unix.SYS_MOUNT}, "fsopen": {unix.SYS_FSOPEN}, "pivot_root": {unix.SYS_PIVOT_ROOT},
	"reboot": {unix.SYS_REBOOT}, "swapon": {unix.SYS_SWAPON}, "setns": {unix.SYS_SETNS, ^uintptr(0)},
	"unshare": {unix.SYS_UNSHARE}, "ptrace": {unix.SYS_PTRACE, unix.PTRACE_CONT, 1},
	"process_vm_writev": {unix.SYS_PROCESS_VM_WRITEV}, "settimeofday": {unix.SYS_SETTIMEOFDAY, 1},
	"open_by_handle_at": {unix.SYS_OPEN_BY_HANDLE_AT}, "iopl": {unix.SYS_IOPL, 4},
	"perf_event_open": {unix.SYS_PERF_EVENT_OPEN},
}

// stillAllowed are calls that QEMU and its helpers use, in the form of deniedNumbers.
var stillAllowed = map[string][]uintptr{
	"bpf": {unix.SYS_BPF, ^uintptr(0)}, "keyctl": {unix.SYS_KEYCTL, ^uintptr(0)},
	"io_uring_setup": {unix.SYS_IO_URING_SETUP}, "chroot": {unix.SYS_CHROOT},
	"userfaultfd": {unix.SYS_USERFAULTFD, ^uintptr(0)},
}

// startedRole is a program that was started by a process of starterRole.
func startedRole([]string) (map[string]string, error) {
	report := map[string]string{}
	for _, calls := range []map[string][]uintptr{deniedNumbers, stillAllowed} {
		for name, call := range calls {
			var a [7]uintptr
			copy(a[:], call)
			_, _, errno := unix.RawSyscall6(a[0], a[1], a[2], a[3], a[4], a[5], a[6])
			report[name] = unix.ErrnoName(errno)
		}
	}
	s, err := status("/proc/thread-self")
	for key, value := range s {
		report[key] = value
	}
	return report, err
}

// starterRole drops the capabilities in args, confines itself as the Starter's process does, and starts a program.
func starterRole(args []string) (map[string]string, error) {
	set := cap.GetProc()
	for _, name := range args {
		c, err := cap.FromName(name)
		if err != nil {
			return nil, err
		}
		err = errors.Join(cap.DropBound(c), set.SetFlag(cap.Effective, false, c), set.SetFlag(cap.Permitted, false, c))
		if err != nil {
			return nil, err
		}
	}
	if err := set.SetProc(); err != nil {
		return nil, err
	}
	if err := ApplyToStarter(); err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=started")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	var report map[string]string
	return report, json.Unmarshal(out, &report)
}

func bounding(t *testing.T, report map[string]string) uint64 {
	t.Helper()
	bits, err := strconv.ParseUint(report["CapBnd"], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return bits
}

// TestStartedPrograms: a started program is refused what no QEMU needs. It keeps the rest, and may start set-user-ID
// programs.
func TestStartedPrograms(t *testing.T) {
	report := play(t, "starter")
	for name := range deniedNumbers {
		if report[name] != "EPERM" {
			t.Errorf("%s: %q, want EPERM", name, report[name])
		}
	}
	for name := range stillAllowed {
		if report[name] == "EPERM" || report[name] == "ENOSYS" {
			t.Errorf("%s: %s", name, report[name])
		}
	}
	if report["NoNewPrivs"] != "0" || report["Seccomp"] != "2" {
		t.Errorf("no_new_privs %s, seccomp %s", report["NoNewPrivs"], report["Seccomp"])
	}
	for _, c := range notForQEMU {
		if bounding(t, report)&(1<<c) != 0 {
			t.Errorf("%v can be had again", c)
		}
	}
	if bounding(t, report)&(1<<cap.NET_ADMIN) == 0 {
		t.Error("CAP_NET_ADMIN is gone, which a network's helper needs")
	}
}

// TestStartedByAServiceManager: without CAP_SYS_ADMIN there is no filter, but the kernel refuses the same calls.
func TestStartedByAServiceManager(t *testing.T) {
	report := play(t, "starter", cap.SYS_ADMIN.String())
	if report["Seccomp"] != "0" {
		t.Errorf("seccomp %s", report["Seccomp"])
	}
	for _, name := range []string{"fsopen", "reboot", "swapon", "pivot_root"} { // the others check their arguments first
		if errno := report[name]; errno != "EPERM" {
			t.Errorf("%s: %q, want EPERM", name, errno)
		}
	}
	if bounding(t, report)&(1<<cap.SYS_MODULE|1<<cap.SYS_PTRACE) != 0 {
		t.Errorf("bounding set %s", report["CapBnd"])
	}
}

// TestOneABI: the filter decides by the architecture in struct seccomp_data.
func TestOneABI(t *testing.T) {
	vm, err := bpf.NewVM(oneABI)
	if err != nil {
		t.Fatal(err)
	}
	for arch, want := range map[uint32]uint32{
		unix.AUDIT_ARCH_X86_64: unix.SECCOMP_RET_ALLOW, unix.AUDIT_ARCH_I386: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM),
	} {
		data := make([]byte, 64)
		binary.BigEndian.PutUint32(data[4:], arch) // as the virtual machine reads it
		if got, err := vm.Run(data); err != nil || uint32(got) != want {
			t.Errorf("architecture %#x: %#x, %v", arch, got, err)
		}
	}
}

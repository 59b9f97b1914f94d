// SPDX-License-Identifier: Apache-2.0

package confine

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"github.com/migrated-vm/migrated/pkg/testenv"
)

// roleVariable names the environment variable with the role of this process. With a role, it plays that instead of
// running tests: confinement is permanent, so each test confines a process of its own.
const roleVariable = "MIGRATED_CONFINE_TEST"

func TestMain(m *testing.M) {
	role, ok := roles[os.Getenv(roleVariable)]
	if !ok {
		os.Exit(m.Run())
	}
	report, err := role(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

var roles = map[string]func(args []string) (map[string]string, error){
	"forbidden": forbiddenRole, "threads": threadsRole, "program": programRole, "needs": needsRole, "daemon": daemonRole,
	"partly": partlyRole, "starter": starterRole, "started": startedRole,
}

// play runs this test's program in a role and returns what it reports.
func play(t *testing.T, role string, args ...string) map[string]string {
	t.Helper()
	if os.Geteuid() != 0 {
		testenv.CannotRun(t, "needs root, to have something to give up")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role, "GORACE=atexit_sleep_ms=0")
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", role, err, said.String())
	}
	var report map[string]string
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%s reports %q: %v", role, out, err)
	}
	return report
}

// forbidden are calls that the daemon never makes, with arguments that have no effect if the call is permitted.
var forbidden = map[string]struct {
	nr   uintptr
	args []uintptr
}{
	"mount":      {unix.SYS_MOUNT, nil},
	"umount2":    {unix.SYS_UMOUNT2, nil},
	"pivot_root": {unix.SYS_PIVOT_ROOT, nil},
	"fsopen":     {unix.SYS_FSOPEN, nil},
	"unshare":    {unix.SYS_UNSHARE, nil},
	"setns":      {unix.SYS_SETNS, []uintptr{^uintptr(0)}},
	"clone of no flags": {unix.SYS_CLONE, []uintptr{
		unix.CLONE_PARENT_SETTID | unix.CLONE_FS | unix.CLONE_NEWNS, // invalid together
	}},
	"execve":            {unix.SYS_EXECVE, nil},
	"execveat":          {unix.SYS_EXECVEAT, nil},
	"bpf":               {unix.SYS_BPF, []uintptr{^uintptr(0)}},
	"perf_event_open":   {unix.SYS_PERF_EVENT_OPEN, nil},
	"init_module":       {unix.SYS_INIT_MODULE, nil},
	"finit_module":      {unix.SYS_FINIT_MODULE, []uintptr{^uintptr(0)}},
	"delete_module":     {unix.SYS_DELETE_MODULE, nil},
	"kexec_load":        {unix.SYS_KEXEC_LOAD, []uintptr{0, 1 << 30}},
	"reboot":            {unix.SYS_REBOOT, nil},
	"swapon":            {unix.SYS_SWAPON, nil},
	"sethostname":       {unix.SYS_SETHOSTNAME, []uintptr{0, ^uintptr(0)}},
	"settimeofday":      {unix.SYS_SETTIMEOFDAY, []uintptr{1}},
	"keyctl":            {unix.SYS_KEYCTL, []uintptr{^uintptr(0)}},
	"io_uring_setup":    {unix.SYS_IO_URING_SETUP, nil},
	"process_vm_writev": {unix.SYS_PROCESS_VM_WRITEV, nil},
	"open_by_handle_at": {unix.SYS_OPEN_BY_HANDLE_AT, nil},
	"mknodat":           {unix.SYS_MKNODAT, []uintptr{^uintptr(0)}},
	"setxattr":          {unix.SYS_SETXATTR, nil},
	"setuid":            {unix.SYS_SETUID, nil},
	"chroot":            {unix.SYS_CHROOT, nil},
	"iopl":              {unix.SYS_IOPL, []uintptr{4}},
	"raw socket":        {unix.SYS_SOCKET, []uintptr{unix.AF_PACKET, unix.SOCK_RAW, 0x0300}},
	"32-bit call":       {0x40000000 | unix.SYS_GETPID, nil}, // of the x32 ABI
}

func tryForbidden(when string, report map[string]string) {
	for name, call := range forbidden {
		var a [6]uintptr
		copy(a[:], call.args)
		fd, _, errno := unix.RawSyscall6(call.nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if name == "raw socket" && errno == 0 {
			_ = unix.Close(int(fd))
		}
		report[when+name] = unix.ErrnoName(errno)
	}
}

// forbiddenRole makes each call before Apply and after it.
func forbiddenRole([]string) (map[string]string, error) {
	report := map[string]string{}
	tryForbidden("before: ", report)
	if err := Apply(); err != nil {
		return nil, err
	}
	tryForbidden("after: ", report)
	return report, nil
}

// TestForbidden: the filter refuses calls that the daemon never makes.
func TestForbidden(t *testing.T) {
	report := play(t, "forbidden")
	for name := range forbidden {
		before, after := report["before: "+name], report["after: "+name]
		want := "EPERM"
		if name == "32-bit call" {
			want = "ENOSYS"
		}
		if after != want {
			t.Errorf("%s: %q, want %s; before: %q", name, after, want, before)
		}
		if before == want && name != "32-bit call" {
			t.Logf("%s: %s before, too: here it shows nothing", name, before)
		}
	}
}

// status returns a thread's capabilities, no_new_privs and filter, from proc_pid_status(5).
func status(task string) (map[string]string, error) {
	text, err := os.ReadFile(task + "/status")
	if err != nil {
		return nil, err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		if strings.HasPrefix(key, "Cap") || key == "NoNewPrivs" || key == "Seccomp" {
			values[key] = strings.TrimSpace(value)
		}
	}
	return values, nil
}

// threadsRole confines a process of many threads that make system calls, and reports on each.
func threadsRole([]string) (map[string]string, error) {
	const n = 8
	var started sync.WaitGroup
	end := make(chan struct{})
	defer close(end)
	for range n {
		started.Add(1)
		go func() {
			runtime.LockOSThread()
			started.Done()
			<-end
		}()
	}
	started.Wait()
	if err := Apply(); err != nil {
		return nil, err
	}
	for range n { // threads that start confined
		started.Add(1)
		go func() {
			runtime.LockOSThread()
			started.Done()
			<-end
		}()
	}
	started.Wait()
	tasks, err := filepath.Glob("/proc/self/task/*")
	if err != nil || len(tasks) < 2*n {
		return nil, fmt.Errorf("threads %v, %w", tasks, err)
	}
	report := map[string]string{}
	for _, task := range tasks {
		s, err := status(task)
		if err != nil {
			return nil, err
		}
		text, err := json.Marshal(s)
		if err != nil {
			return nil, err
		}
		report[filepath.Base(task)] = string(text)
	}
	return report, nil
}

// TestAllThreads: each thread has the needed capabilities, and no others in any set.
func TestAllThreads(t *testing.T) {
	var bits uint64
	for _, c := range Needed {
		bits |= 1 << c
	}
	kept := fmt.Sprintf("%016x", bits)
	want := map[string]string{
		"CapInh": "0000000000000000", "CapPrm": kept, "CapEff": kept, "CapBnd": kept, "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2",
	}
	for task, text := range play(t, "threads") {
		var got map[string]string
		if err := json.Unmarshal([]byte(text), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("thread %s (-want +got):\n%s", task, diff)
		}
	}
}

// programRole tries to start a program as package os does.
func programRole([]string) (map[string]string, error) {
	if err := Apply(); err != nil {
		return nil, err
	}
	err := exec.Command("/bin/true").Run()
	return map[string]string{
		"permission": strconv.FormatBool(errors.Is(err, os.ErrPermission)), "error": fmt.Sprint(err),
	}, nil
}

func TestStartsNoProgram(t *testing.T) {
	if report := play(t, "program"); report["permission"] != "true" {
		t.Errorf("starting a program: %s", report["error"])
	}
}

// daemonRole does what the daemon does and no other test here covers.
func daemonRole([]string) (map[string]string, error) {
	dir, err := os.MkdirTemp("", "migrated-confine-")
	if err != nil {
		return nil, err
	}
	if err := Apply(); err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	report := map[string]string{}
	for name, do := range map[string]func() error{
		"state":     func() error { s, err := Current(); report["shown"] = s.String(); return err },
		"files":     func() error { return os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600) },
		"tcp":       func() error { return converse("tcp", "127.0.0.1:0") },
		"unix":      func() error { return converse("unix", filepath.Join(dir, "s")) },
		"names":     func() error { _, err := net.LookupHost("localhost"); return err },
		"addresses": func() error { _, err := net.InterfaceAddrs(); return err },
	} {
		if err := do(); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return report, nil
}

// converse listens, connects, and sends a byte.
func converse(network, address string) error {
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	defer l.Close()
	conn, err := net.Dial(network, l.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	peer, err := l.Accept()
	if err != nil {
		return err
	}
	defer peer.Close()
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err = peer.Read(make([]byte, 1))
	return err
}

func TestDaemonsWork(t *testing.T) {
	const want = "capabilities chown, dac_override, kill, sys_ptrace, lease, checkpoint_restore; no new privileges; " +
		"system calls filtered"
	if report := play(t, "daemon"); report["shown"] != want {
		t.Errorf("it is shown as %q, want %q", report["shown"], want)
	}
}

// partlyRole is a daemon without CAP_SETPCAP and with CAP_SYS_PTRACE as its only needed capability, as when an ordinary
// user runs it.
func partlyRole([]string) (map[string]string, error) {
	had := cap.NewSet()
	if err := errors.Join(
		had.SetFlag(cap.Permitted, true, cap.SYS_PTRACE, cap.NET_ADMIN),
		had.SetFlag(cap.Effective, true, cap.SYS_PTRACE, cap.NET_ADMIN), had.SetProc(),
	); err != nil {
		return nil, err
	}
	if err := Apply(); err != nil {
		return nil, err
	}
	s, err := Current()
	return map[string]string{"complete": strconv.FormatBool(s.Complete()), "shown": s.String()}, err
}

func TestKeepsNoMoreThanItHad(t *testing.T) {
	want := map[string]string{
		"complete": "true", "shown": "capabilities sys_ptrace; no new privileges; system calls filtered",
	}
	if diff := cmp.Diff(want, play(t, "partly")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestNotConfined(t *testing.T) {
	s, err := Current()
	if err != nil {
		t.Fatal(err)
	}
	if s.Complete() {
		t.Errorf("the test's own process is %v", s)
	}
	t.Log(s)
}

func TestNotSupported(t *testing.T) {
	err := error(&NotSupportedError{Feature: "filter of system calls", MinKernel: "3.17", Option: "CONFIG_SECCOMP_FILTER"})
	if !errors.Is(err, ErrNotSupported) || errors.Is(err, syscall.ENOSYS) || !strings.Contains(err.Error(), "3.17") {
		t.Error(err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Host is one machine of the lab.
type Host struct {
	Name string
	// Addr is the host's IP address on the cable.
	Addr string
	// Daemon is the program that StartDaemon starts. If it is empty, that is the program under test.
	Daemon string

	lab     *Lab
	anchor  *exec.Cmd // holds the namespaces open
	manager int       // pid of systemd, which is process 1 of a managed host; 0 if the host is not managed
}

// becomeHost is the script of a host's first process in its new namespaces. It
// makes the host's private mounts, which also hide those of a migrated that the
// machine has, and then stays. An ordinary user may use
// KVM and taps there, as on a host where the user is in the group kvm and has
// its own taps.
const becomeHost = `
set -e
mount -t tmpfs -o mode=0755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=0755 tmpfs /var/log
[ ! -d /etc/migrated ] || mount -t tmpfs -o mode=0755 tmpfs /etc/migrated
mkdir -p /dev/hugepages
mount -t hugetlbfs -o mode=1777 hugetlbfs /dev/hugepages
mkdir /run/shared /run/local
mount --bind "$1/shared" /run/shared
mount --bind "$1/$2" /run/local
if [ -e /dev/kvm ]; then
	mknod -m 0666 /run/kvm c 10 232
	mount --bind /run/kvm /dev/kvm
fi
if [ -e /dev/net/tun ]; then
	mknod -m 0666 /run/tun c 10 200
	mount --bind /run/tun /dev/net/tun
fi
ip link set lo up
echo ready
exec sleep infinity
`

func (l *Lab) newHost(name, addr string) (*Host, error) {
	h := &Host{Name: name, Addr: addr, lab: l}
	if err := l.makeDir(name); err != nil {
		return nil, fmt.Errorf("storage of host %s: %w", name, err)
	}
	h.anchor = exec.Command("unshare", "--mount", "--net", "--propagation", "private",
		"sh", "-c", becomeHost, "sh", l.storage, name)
	h.anchor.Stderr = os.Stderr
	// A lab whose process dies must not leave namespaces behind.
	h.anchor.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := h.anchor.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := l.startLocked(h.anchor); err != nil {
		return nil, fmt.Errorf("namespaces of host %s: %w", name, err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		return nil, fmt.Errorf("namespaces of host %s: no root, or no mount and ip commands? (%q, %w)", name, line, err)
	}
	return h, nil
}

// PID is the pid of a process in the host's namespaces.
func (h *Host) PID() int { return h.anchor.Process.Pid }

// Path returns the path, outside of the host, of a file of the host.
func (h *Host) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(h.PID()), "root", path)
}

// Command returns a command that runs on the host. The caller runs it.
func (h *Host) Command(ctx context.Context, argv ...string) *exec.Cmd {
	namespaces := []string{"--mount=" + h.ns("mnt"), "--net=" + h.ns("net")}
	if h.manager != 0 {
		namespaces = h.managed()
	}
	return exec.CommandContext(ctx, "nsenter", slices.Concat(namespaces, []string{"--wdns=/", "--"}, argv)...)
}

func (h *Host) ns(kind string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", h.PID(), kind)
}

// Run runs a command on the host to its end and returns its standard output.
// Its standard error is part of the error.
func (h *Host) Run(ctx context.Context, argv ...string) (string, error) {
	cmd := h.Command(ctx, argv...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s on %s: %w: %s", argv[0], h.Name, err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// Process is a process on a host. It ends with the lab at the latest.
type Process struct {
	PID    int
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // of Wait; valid when exited is closed
}

// Start starts a long-lived command on the host, its output appended to log.
func (h *Host) Start(log io.Writer, argv ...string) (*Process, error) {
	cmd := h.Command(context.Background(), argv...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := h.lab.startLocked(cmd); err != nil {
		return nil, fmt.Errorf("%s on %s: %w", argv[0], h.Name, err)
	}
	p := &Process{PID: cmd.Process.Pid, cmd: cmd, exited: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	h.lab.onClose(func() error { return p.Kill() })
	return p, nil
}

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Kill ends the process and waits for its end. It is no error if the process has ended already.
func (p *Process) Kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	<-p.exited
	return nil
}

// Stop asks the process to end, waits for it and returns its error.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.exited:
		return p.err
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("process %d did not end: %w", p.PID, ctx.Err()), p.Kill())
	}
}

// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// becomeManaged is the script that makes systemd process 1 of the host, in new namespaces of processes and control
// groups. systemd has only the units that are put into /run/systemd/system, and starts none of the machine's. $1 is the
// name of a control group for it in every hierarchy, so that it leaves nothing behind in the machine's groups.
const becomeManaged = `
for mount in $(awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/self/mounts); do
	# cpuset takes nobody in at first; systemd does without.
	mkdir "$mount/$1" && echo $$ > "$mount/$1/cgroup.procs" 2>/dev/null
done
exec unshare --pid --fork --kill-child --mount --cgroup --ipc --uts --propagation private sh -c '
set -e
mount -t proc proc /proc
umount -R /sys/fs/cgroup
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir -p /run/systemd/system
printf "[Unit]\nDefaultDependencies=no\n" > /run/systemd/system/nothing.target
touch /run/console
mount --bind /run/console /dev/console
container=lab exec /lib/systemd/systemd --system --unit=nothing.target --show-status=no --log-target=console
'`

// ErrNoSystemd says that this machine has no systemd for a managed host.
var ErrNoSystemd = errors.New("no systemd (/lib/systemd/systemd) on this machine")

// Manage makes systemd the service manager of the host, as process 1 of a new namespace of processes. Commands that are
// started on the host afterwards are in that namespace. It needs writable cgroups.
func (h *Host) Manage(ctx context.Context) error {
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		return fmt.Errorf("%w: %w", ErrNoSystemd, err)
	}
	log, err := os.Create(h.Path("/run/systemd.log"))
	if err != nil {
		return err
	}
	defer log.Close() // systemd has its own descriptor
	group := fmt.Sprintf("migrated-lab-%d", h.PID())
	h.lab.onClose(func() error { return removeGroups(group) }) // runs after systemd's end: closers run in reverse order
	p, err := h.Start(log, "sh", "-c", becomeManaged, "sh", group)
	if err != nil {
		return err
	}
	for {
		if h.manager, err = childNamed(p.PID, "systemd"); err == nil {
			if _, err = h.Run(ctx, "systemctl", "show", "--property=Version"); err == nil {
				return nil
			}
		}
		select {
		case <-p.Exited():
			said, _ := os.ReadFile(log.Name())
			return fmt.Errorf("systemd of host %s ended: %w: %s", h.Name, p.err, said)
		case <-ctx.Done():
			return fmt.Errorf("systemd of host %s does not answer: %w", h.Name, err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// childNamed returns the pid of the child of parent with that name.
func childNamed(parent int, name string) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		pid, rest, _ := strings.Cut(string(text), " (")
		comm, rest, _ := strings.Cut(rest, ") ")
		if fields := strings.Fields(rest); comm == name && len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			return strconv.Atoi(pid)
		}
	}
	return 0, fmt.Errorf("process %d has no child %s", parent, name)
}

// removeGroups removes the control groups that systemd made, once no process is in them.
func removeGroups(name string) error {
	mounts, err := os.Open("/proc/self/mounts")
	if err != nil {
		return err
	}
	defer mounts.Close()
	var errs []error
	for scan := bufio.NewScanner(mounts); scan.Scan(); {
		if fields := strings.Fields(scan.Text()); strings.HasPrefix(fields[2], "cgroup") {
			errs = append(errs, removeTree(filepath.Join(fields[1], name)))
		}
	}
	return errors.Join(errs...)
}

// removeTree removes directories of a control group hierarchy, the innermost first. It repeats the attempt: a killed
// process leaves its group a moment later.
func removeTree(dir string) error {
	var dirs []string
	if err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}); err != nil {
		return err
	}
	for _, path := range slices.Backward(dirs) {
		until := time.Now().Add(10 * time.Second)
		for err := os.Remove(path); err != nil; err = os.Remove(path) {
			if time.Now().After(until) {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}

// InstallUnit installs the daemon's delivered unit on a managed host. It changes the command, and drops the
// dependencies on the boot, because a host of the lab does not boot.
func (h *Host) InstallUnit(ctx context.Context, unit string, extra ...string) error {
	text, err := os.ReadFile(unit)
	if err != nil {
		return err
	}
	program, err := h.program()
	if err != nil {
		return err
	}
	const start = "ExecStart=/usr/bin/migrated serve"
	if !strings.Contains(string(text), start) {
		return fmt.Errorf("%s does not start with %q", unit, start)
	}
	lines := []string{}
	for line := range strings.Lines(string(text)) {
		switch {
		case strings.HasPrefix(line, "Wants="), strings.HasPrefix(line, "After="):
		case strings.HasPrefix(line, start):
			lines = append(lines,
				"ExecStart="+strings.Join(append(
					[]string{program, "serve", "--plaintext", "--listen", h.DaemonAddr()},
					append(labSettings(), extra...)...,
				), " ")+"\n",
				"StandardOutput=append:/run/migrated.log\n", "StandardError=append:/run/migrated.log\n")
		case strings.HasPrefix(line, "[Unit]"):
			lines = append(lines, line, "DefaultDependencies=no\n")
		default:
			lines = append(lines, line)
		}
	}
	if err := os.WriteFile(
		h.Path("/run/systemd/system/migrated.service"), []byte(strings.Join(lines, "")), 0o644,
	); err != nil {
		return err
	}
	return h.Systemctl(ctx, "daemon-reload")
}

// Systemctl runs systemctl on a managed host.
func (h *Host) Systemctl(ctx context.Context, args ...string) error {
	_, err := h.Run(ctx, append([]string{"systemctl"}, args...)...)
	return err
}

// managed returns the arguments of nsenter for the namespaces of a managed host.
func (h *Host) managed() []string {
	return []string{"--target=" + strconv.Itoa(h.manager), "--mount", "--pid", "--net", "--ipc", "--uts"}
}

// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/internal/qmp"
)

// VMDir is the directory of the VM's files on a host.
const VMDir = "/run/vm"

// Paths of the VM on its host.
const (
	QMPPath    = VMDir + "/qmp.sock"
	SerialPath = VMDir + "/serial.sock" // the guest's reports and commands
	SerialLog  = VMDir + "/serial.log"
	ConsoleLog = VMDir + "/console.log"
)

// The files from which the VM boots are copied to the same paths on both hosts, as if
// the hosts shared them. An ordinary user can read them there.
const (
	kernelPath = VMDir + "/kernel"
	initrdPath = VMDir + "/initrd"
	diskPath   = VMDir + "/disk"
)

// nobody is the user of unprivileged VMs.
const nobody = 65534

// VMConfig is the machine under test.
type VMConfig struct {
	KVM          bool // otherwise TCG, with one thread per vCPU
	VCPUs        int
	MemoryMiB    int
	Nodes        int // number of NUMA nodes, each with a memory backend
	Backend      Backend
	HugePages    bool // 2 MiB pages, for backends that can have them
	Unprivileged bool // QEMU runs as an ordinary user, in its sandbox
	// Kernel and Initrd start a Linux guest, Disk a guest that boots by itself.
	Kernel, Initrd, Disk string
	// Disks is the number of writable qcow2 images in SharedDir. StartVM makes them. The guest does not boot from them.
	Disks int
	// NICs is the number of network cards, each in its own network with the lab's client. Number distinguishes the cards
	// of the lab's VMs, if there are several: 0 to card.MaxVMs-1.
	NICs, Number int
	// Macvtap gives a domain of libvirt's cards that are macvtap devices (<interface type='direct'>), made by libvirt.
	Macvtap bool
	// RootPorts gives each device that can be behind a root port its own port, eight ports to a slot.
	RootPorts         bool
	Balloon           bool
	FreePageReporting bool // by a balloon
	RNG               bool
	VGA               bool
	UEFI              bool // otherwise SeaBIOS
	Paused            bool // the VM does not run until it is told to
	// KernelArgs are appended to the kernel command line.
	KernelArgs []string
	// Extra are further arguments of QEMU.
	Extra []string
}

// Args is QEMU's command line.
func (c VMConfig) Args() []string {
	accel := "tcg,thread=multi"
	cpu := "max"
	if c.KVM {
		// This is the default model. A model with the host's own features needs more of
		// KVM than hosts without hardware virtualization have.
		accel, cpu = "kvm", "qemu64"
	}
	args := []string{
		"qemu-system-x86_64", "-name", "guest,debug-threads=on", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-accel", accel, "-cpu", cpu,
		"-smp", strconv.Itoa(c.VCPUs), "-m", fmt.Sprintf("%dM", c.MemoryMiB),
		"-qmp", "unix:" + QMPPath + ",server=on,wait=off",
	}
	args = slices.Concat(args, c.memoryArgs(), c.firmwareArgs(), c.deviceArgs())
	if c.Paused {
		args = append(args, "-S")
	}
	if c.Unprivileged {
		args = append(args, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	serial := "socket,id=report,path=" + SerialPath + ",server=on,wait=off,logfile=" + SerialLog + ",logappend=on"
	if c.Kernel != "" {
		args = append(args,
			"-chardev", "file,id=console,path="+ConsoleLog+",append=on", "-serial", "chardev:console",
			"-chardev", serial, "-serial", "chardev:report",
			"-kernel", kernelPath, "-initrd", initrdPath,
			"-append", strings.Join(slices.Concat([]string{image.CommandLine}, c.deviceParams(), c.KernelArgs), " "))
	} else {
		args = append(args, "-chardev", serial, "-serial", "chardev:report",
			"-drive", "file="+diskPath+",format=raw,if=none,id=boot,snapshot=on", "-device", "ide-hd,drive=boot,bus=ide.0")
	}
	return append(args, c.Extra...)
}

// MakeVMDir makes the VM's directory on a host. An operator does that on
// both hosts before a migration.
func (h *Host) MakeVMDir() error {
	dir := h.Path(VMDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chown(dir, nobody, nobody) // root can write there, too
}

// Install copies the files from which the VM boots to both hosts, and makes its storage and networks.
func (l *Lab) Install(ctx context.Context, c VMConfig) error {
	if err := errors.Join(l.MakeStorage(ctx, c, nil), l.MakeNICs(ctx, c)); err != nil {
		return err
	}
	for _, h := range l.Hosts() {
		if err := h.MakeVMDir(); err != nil {
			return err
		}
		for to, from := range map[string]string{kernelPath: c.Kernel, initrdPath: c.Initrd, diskPath: c.Disk} {
			if from == "" {
				continue
			}
			content, err := os.ReadFile(from)
			if err != nil {
				return err
			}
			if err := os.WriteFile(h.Path(to), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// StartVM starts QEMU on the host and waits until its QMP socket exists.
func (h *Host) StartVM(ctx context.Context, c VMConfig, extra ...string) (*Process, error) {
	if err := h.lab.Install(ctx, c); err != nil {
		return nil, err
	}
	argv := append(c.Args(), extra...)
	if c.Unprivileged {
		argv = append([]string{
			"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--",
		}, argv...)
	}
	log, err := os.OpenFile(h.Path(VMDir+"/qemu.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close() // QEMU has its own descriptor
	p, err := h.Start(log, argv...)
	if err != nil {
		return nil, err
	}
	for {
		conn, err := qmp.Dial(ctx, h.Path(QMPPath))
		if err == nil {
			return p, conn.Disconnect()
		}
		select {
		case <-p.Exited():
			said, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("QEMU on host %s ended: %w: %s", h.Name, p.err, said)
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// A Linux guest is ready within seconds, unless TCG of QEMU 7.2 fails. With several vCPUs it does so once in some ten
// boots, while the guest assigns addresses to its devices: QEMU ends with an assertion in msix_table_mmio_write, or
// the guest stops reporting. The VM is then booted again.
const (
	bootTries    = 3
	bootPatience = 75 * time.Second // of each try but the last
)

// Boot starts a VM whose guest reports, and returns when the guest works. The guest's reports go to log from then on,
// until the port is closed.
func (h *Host) Boot(ctx context.Context, c VMConfig, log *report.Log, extra ...string) (*report.Port, error) {
	for try := 1; ; try++ {
		port, err := h.boot(ctx, try < bootTries, c, log, extra...)
		if err == nil || try == bootTries || ctx.Err() != nil || log.Len() > 0 { // the guest has reported: not TCG's fault
			return port, err
		}
	}
}

func (h *Host) boot(
	ctx context.Context, bounded bool, c VMConfig, log *report.Log, extra ...string,
) (*report.Port, error) {
	p, err := h.StartVM(ctx, c, extra...)
	if err != nil {
		return nil, err
	}
	if bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, bootPatience)
		defer cancel()
	}
	ctx, ended := context.WithCancelCause(ctx)
	defer ended(nil)
	go func() {
		select {
		case <-p.Exited():
			ended(fmt.Errorf("QEMU on host %s ended: %w", h.Name, p.err))
		case <-ctx.Done():
		}
	}()
	port, err := h.Guest(ctx, log)
	if err != nil {
		return nil, errors.Join(err, p.Kill())
	}
	if _, err := log.WaitReady(ctx); err != nil {
		_ = port.Close() // QEMU may have ended
		return nil, errors.Join(err, p.Kill())
	}
	return port, nil
}

// QMP connects to the VM on this host. QEMU serves one client at a time.
func (h *Host) QMP(ctx context.Context) (*qmp.Client, error) { return qmp.Dial(ctx, h.Path(QMPPath)) }

// Runs reports whether a QEMU's VM runs.
func Runs(ctx context.Context, client *qmp.Client) (bool, error) {
	var status struct {
		Running bool `json:"running"`
	}
	err := client.Do(ctx, "query-status", nil, &status)
	return status.Running, err
}

// Guest opens the guest's reports on this host. log may be the one of the host before: it then continues.
func (h *Host) Guest(ctx context.Context, log *report.Log) (*report.Port, error) {
	return report.Open(ctx, h.Path(SerialPath), log)
}

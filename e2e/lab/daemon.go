// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// DaemonPort is the port at which the lab's daemons reach each other.
const DaemonPort = "7600"

// DaemonSocket is the control socket of a host's daemon.
const DaemonSocket = "/run/migrated/migrated.sock"

// Binary returns the path of the program under test.
func Binary() (string, error) {
	path := os.Getenv("MIGRATED_BINARY")
	if path == "" {
		return "", fmt.Errorf("MIGRATED_BINARY names no program; run this by make demo or make e2e")
	}
	return path, nil
}

// BuildDaemon builds the daemon with a build tag.
func BuildDaemon(ctx context.Context, tag, path string) error {
	build := exec.CommandContext(
		ctx, "go", "build", "-tags", tag, "-o", path, "github.com/migrated-vm/migrated/cmd/migrated",
	)
	if said, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the daemon with tag %s: %w: %s", tag, err, said)
	}
	return nil
}

// Migrated runs a command of the program under test on the host, as an operator does, and returns what it prints.
func (h *Host) Migrated(ctx context.Context, args ...string) (string, error) {
	binary, err := Binary()
	if err != nil {
		return "", err
	}
	return h.Run(ctx, append([]string{binary}, args...)...)
}

// program returns the path of the host's daemon program.
func (h *Host) program() (string, error) {
	if h.Daemon != "" {
		return h.Daemon, nil
	}
	return Binary()
}

// labSettings are settings for the lab's VMs: they run as root, and their templates are in VMDir.
func labSettings() []string { return []string{"--min-uid", "0", "--template-dir", VMDir} }

// DaemonAddr is the address at which the host's daemon listens for other daemons.
func (h *Host) DaemonAddr() string { return net.JoinHostPort(h.Addr, DaemonPort) }

// The second daemon of a host runs beside the first one and shares nothing with it.
const (
	secondPort = "7601"
	// SecondSocket is the second daemon's control socket, secondState its state directory.
	SecondSocket = "/run/migrated-second/migrated.sock"
	secondState  = "/run/migrated-second/state"
)

// SecondDaemonAddr is the address at which the host's second daemon listens for other daemons.
func (h *Host) SecondDaemonAddr() string { return net.JoinHostPort(h.Addr, secondPort) }

// StartSecondDaemon starts another daemon on the host, beside that of StartDaemon, and waits until it answers.
func (h *Host) StartSecondDaemon(ctx context.Context, log io.Writer, extra ...string) (*Process, error) {
	place := []string{"--socket", SecondSocket, "--state-dir", secondState}
	return h.startDaemon(ctx, log, h.SecondDaemonAddr(), SecondSocket, append(place, extra...))
}

// StartDaemon starts the host's daemon and waits until it answers.
func (h *Host) StartDaemon(ctx context.Context, log io.Writer, extra ...string) (*Process, error) {
	return h.startDaemon(ctx, log, h.DaemonAddr(), DaemonSocket, extra)
}

func (h *Host) startDaemon(
	ctx context.Context, log io.Writer, address, socket string, extra []string,
) (*Process, error) {
	binary, err := h.program()
	if err != nil {
		return nil, err
	}
	args := append([]string{binary, "serve", "--listen", address}, append(labSettings(), extra...)...)
	if !slices.Contains(extra, "--tls-ca") {
		args = append(args, "--plaintext") // both ends of the cable are ours
	}
	p, err := h.Start(log, args...)
	if err != nil {
		return nil, err
	}
	for {
		// The daemon makes this socket last.
		conn, err := net.Dial("unix", h.Path(socket))
		if err == nil {
			return p, conn.Close()
		}
		select {
		case <-p.Exited():
			return nil, fmt.Errorf("the daemon of host %s ended: %w", h.Name, p.err)
		case <-ctx.Done():
			return nil, fmt.Errorf("the daemon of host %s does not answer: %w", h.Name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Control connects to the control API of the host's daemon.
func (h *Host) Control() (*grpc.ClientConn, migratedv1.ControlServiceClient, error) {
	conn, err := grpc.NewClient("unix://"+h.Path(DaemonSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return conn, migratedv1.NewControlServiceClient(conn), nil
}

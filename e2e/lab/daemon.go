// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
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

// program is what the host's daemon is.
func (h *Host) program() (string, error) {
	if h.Daemon != "" {
		return h.Daemon, nil
	}
	return Binary()
}

// labSettings let the lab's VMs in: they run as root, and their templates are beside them.
func labSettings() []string { return []string{"--min-uid", "0", "--template-dir", VMDir} }

// DaemonAddr is where the host's daemon listens for other daemons.
func (h *Host) DaemonAddr() string { return net.JoinHostPort(h.Addr, DaemonPort) }

// StartDaemon starts the host's daemon and waits until it answers.
func (h *Host) StartDaemon(ctx context.Context, log io.Writer, extra ...string) (*Process, error) {
	binary, err := h.program()
	if err != nil {
		return nil, err
	}
	args := append([]string{binary, "serve", "--listen", h.DaemonAddr()}, append(labSettings(), extra...)...)
	if !slices.Contains(extra, "--tls-ca") {
		args = append(args, "--plaintext") // the cable has two ends and both are ours
	}
	p, err := h.Start(log, args...)
	if err != nil {
		return nil, err
	}
	for {
		// The daemon makes this socket last.
		conn, err := net.Dial("unix", h.Path(DaemonSocket))
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

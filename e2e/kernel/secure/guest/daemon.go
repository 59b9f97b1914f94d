// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
)

const (
	daemonDir    = "/run/migrated"
	daemonSocket = daemonDir + "/migrated.sock"
	migrated     = "/usr/bin/migrated"
)

func (h *host) daemonAddr() string { return net.JoinHostPort(h.addr, "7600") }

// startDaemon starts the host's daemon and waits until it answers.
func (h *host) startDaemon(ctx context.Context, extra ...string) (*process, error) {
	p, err := h.start(daemonDomain, 0, nil, append([]string{migrated, "serve", "--min-uid", "0",
		"--listen", h.daemonAddr(), "--advertise", h.daemonAddr()}, extra...)...)
	if err != nil {
		return nil, err
	}
	err = until(ctx, "the daemon's socket", func() bool {
		conn, err := net.Dial("unix", h.path(daemonSocket))
		if err == nil {
			err = conn.Close()
		}
		return err == nil || p.ended()
	})
	if err == nil && p.ended() {
		err = fmt.Errorf("the daemon ended: %w", p.err)
	}
	if err != nil {
		return nil, fmt.Errorf("host %s: %w: %s", h.name, err, p.said.String())
	}
	return p, nil
}

// operate runs the program as an operator on this host does, and returns its output.
func (h *host) operate(ctx context.Context, args ...string) (string, error) {
	p, err := h.start("", 0, nil, append([]string{migrated}, args...)...)
	if err != nil {
		return "", err
	}
	said, err := p.wait(ctx)
	if err != nil {
		return said, fmt.Errorf("migrated %s: %w: %s", strings.Join(args, " "), err, said)
	}
	return said, nil
}

// A status is the output of "migrated status" for a migration.
type status struct {
	State       string
	Supervision string
	Label       string `json:"userfaultfdLabel"`
	Progress    struct {
		Faults     string
		PagesTotal string
		Downtime   string
		Residency  string
	}
	Error struct{ Message, Remedy string }
}

func (h *host) status(ctx context.Context, id string) (status, error) {
	said, err := h.operate(ctx, "status", id, "--json")
	if err != nil {
		return status{}, err
	}
	var s status
	if err := json.Unmarshal([]byte(said), &s); err != nil {
		return status{}, fmt.Errorf("migrated status says %q: %w", said, err)
	}
	s.Supervision = strings.ToLower(strings.TrimPrefix(s.Supervision, "SUPERVISION_"))
	return s, nil
}

// SPDX-License-Identifier: Apache-2.0

package qmp

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

type credentials struct {
	pid int
	uid uint32
}

// peerOf asks who listens at the other end. The kernel keeps the credentials that the process had when it
// called listen(2) (SO_PEERCRED in socket(7)).
func peerOf(conn *net.UnixConn) (credentials, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return credentials{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return credentials{}, err
	}
	if credErr != nil {
		return credentials{}, fmt.Errorf("SO_PEERCRED: %w", credErr)
	}
	return credentials{pid: int(cred.Pid), uid: cred.Uid}, nil
}

// accepted tells whether the listener has taken a connection from this socket's backlog. The other end of
// one that was not taken belongs to no file yet: unix_seq_show (net/unix/af_unix.c) shows it as connecting
// (state 02), under the listener's name. In doubt the answer is yes.
//
// Connections of others that wait at the same listener look the same; then, too, it is true that the
// listener does not take what comes.
func (c *Client) accepted() bool {
	const connecting, stateField, pathField = "02", 5, 7
	table, err := os.Open("/proc/self/net/unix")
	if err != nil {
		return true
	}
	defer table.Close()
	listener := c.conn.RemoteAddr().String() // the name bind(2) was given, which may be relative
	for lines := bufio.NewScanner(table); lines.Scan(); {
		fields := strings.SplitN(strings.Join(strings.Fields(lines.Text()), " "), " ", pathField+1)
		if len(fields) > pathField && fields[stateField] == connecting && fields[pathField] == listener {
			return false
		}
	}
	return true
}

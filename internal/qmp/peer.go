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

// peerCredentials returns the credentials of the listener: those that it had when it called listen(2)
// (SO_PEERCRED in socket(7)).
func peerCredentials(conn *net.UnixConn) (credentials, error) {
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

// accepted says whether the listener has accepted this connection. /proc/net/unix shows the other end of a connection
// that waits in the backlog as connecting (state 02), under the listener's path (unix_seq_show in net/unix/af_unix.c).
// If the file cannot be read, the answer is yes.
//
// Other clients' connections in the same backlog look the same. The answer is still right: a listener with a backlog
// does not accept connections.
func (c *Client) accepted() bool {
	const connecting, stateField, pathField = "02", 5, 7
	table, err := os.Open("/proc/self/net/unix")
	if err != nil {
		return true
	}
	defer table.Close()
	listener := c.conn.RemoteAddr().String() // the path that was given to bind(2), which may be relative
	for lines := bufio.NewScanner(table); lines.Scan(); {
		fields := strings.SplitN(strings.Join(strings.Fields(lines.Text()), " "), " ", pathField+1)
		if len(fields) > pathField && fields[stateField] == connecting && fields[pathField] == listener {
			return false
		}
	}
	return true
}

// SPDX-License-Identifier: Apache-2.0

package libvirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/uffd/inject"
)

// handTimeout bounds the fdReader of a descriptor to QEMU's process, and the closing of one there.
const handTimeout = 10 * time.Second

// handed is a descriptor that was passed to QEMU.
type handed struct {
	fd   int      // its number in QEMU's process
	file *os.File // ours
}

// translate replaces the names of descriptors in the arguments of a command by their numbers in QEMU's process.
func (m *monitor) translate(c *command) {
	var args map[string]any
	if json.Unmarshal(c.Arguments, &args) != nil || !m.rename(args) {
		return
	}
	c.Arguments, _ = json.Marshal(args) // it was decoded from JSON, so it can be encoded
}

// rename replaces the names of descriptors in args and in the objects within. It says whether there were any.
func (m *monitor) rename(args map[string]any) (renamed bool) {
	for name, value := range args {
		if inner, ok := value.(map[string]any); ok {
			renamed = m.rename(inner) || renamed
			continue
		}
		text, _ := value.(string)
		h, known := m.handed[text]
		if !known {
			continue
		}
		renamed = true
		if strings.HasPrefix(text, "fd:") {
			args[name] = "fd:" + strconv.Itoa(h.fd)
		} else {
			args[name] = "/proc/self/fd/" + strconv.Itoa(h.fd)
		}
	}
	return renamed
}

// hand passes the descriptor that arrived with the last command to QEMU. key is the name for translate.
func (m *monitor) hand(key string, in *fdReader) error {
	file := in.take()
	if file == nil {
		return errors.New("no descriptor came with the command")
	}
	ctx, cancel := context.WithTimeout(context.Background(), handTimeout)
	defer cancel()
	err := m.checkProcess()
	var fd int
	if err == nil {
		fd, err = inject.Hand(ctx, m.pid, file)
	}
	if err != nil {
		file.Close()
		return err
	}
	if before, known := m.handed[key]; known { // QEMU, too, closes one when its name is used again
		_ = m.takeBack(before)
	}
	m.handed[key] = handed{fd, file}
	return nil
}

// release closes a descriptor in QEMU, and answers the command to do so.
func (m *monitor) release(key string) (answer, error) {
	h, known := m.handed[key]
	if !known {
		return refusal(fmt.Errorf("QEMU has no descriptor %s", key)), nil
	}
	delete(m.handed, key)
	if err := m.takeBack(h); err != nil {
		return failure(err)
	}
	return done, nil
}

// takeBack closes a descriptor in QEMU, and ours.
func (m *monitor) takeBack(h handed) error {
	if err := m.checkProcess(); err != nil {
		return errors.Join(err, h.file.Close())
	}
	ctx, cancel := context.WithTimeout(context.Background(), handTimeout)
	defer cancel()
	return errors.Join(inject.CloseHanded(ctx, m.pid, h.fd, h.file), h.file.Close())
}

// fdReader reads from the client, and keeps the descriptors that arrive.
type fdReader struct {
	conn  *net.UnixConn
	files []*os.File
}

func (p *fdReader) Read(into []byte) (int, error) {
	control := make([]byte, unix.CmsgSpace(4))
	n, controls, _, _, err := p.conn.ReadMsgUnix(into, control)
	if err != nil {
		return 0, err
	}
	messages, parseErr := unix.ParseSocketControlMessage(control[:controls])
	if parseErr != nil {
		return n, parseErr
	}
	for _, message := range messages {
		fds, err := unix.ParseUnixRights(&message)
		if err != nil {
			return n, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			p.files = append(p.files, os.NewFile(uintptr(fd), "handed to a VM of libvirt's"))
		}
	}
	if n == 0 {
		return 0, io.EOF
	}
	return n, nil
}

// take returns the first descriptor that arrived and was not taken; nil: there is none. The caller owns it.
func (p *fdReader) take() *os.File {
	if len(p.files) == 0 {
		return nil
	}
	file := p.files[0]
	p.files = p.files[1:]
	return file
}

// drop closes the descriptors that were not taken.
func (p *fdReader) drop() {
	for _, file := range p.files {
		file.Close()
	}
}

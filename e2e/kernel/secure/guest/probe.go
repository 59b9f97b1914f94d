// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Constants of linux/userfaultfd.h; UFFD_SECURE is from the series.
const (
	userModeOnly = 1
	secure       = 2
	uffdioAPI    = 0xc018aa3f
	uffdAPI      = 0xaa
)

// probe tries userfaultfds as programs other than the daemon do, and prints the answers.
func probe(args []string) {
	if err := try(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func try(args []string) error {
	switch args[0] {
	case "create":
		_, err := create()
		fmt.Println(outcome(err))
		return nil
	case "take":
		return take(args[1], args[2])
	case "send":
		return send(args[1])
	case "receive":
		return receive(args[1])
	case "open":
		f, err := os.Open(args[1])
		fmt.Println(outcome(err))
		if err == nil {
			f.Close()
		}
		return nil
	case "use":
		return use()
	}
	return fmt.Errorf("nothing is named %q", args)
}

// outcome returns one word for an error.
func outcome(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	default:
		return "failed"
	}
}

// create makes a userfaultfd that needs no privilege.
func create() (int, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK | userModeOnly
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags|secure, 0, 0)
	if errno == unix.EINVAL { // an unpatched kernel
		fd, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	}
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// take takes another process' descriptor.
func take(pidText, fdText string) error {
	pid, pidErr := strconv.Atoi(pidText)
	remote, fdErr := strconv.Atoi(fdText)
	if err := errors.Join(pidErr, fdErr); err != nil {
		return err
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	_, err = unix.PidfdGetfd(pidfd, remote, 0)
	fmt.Println(outcome(err))
	return nil
}

// send gives a descriptor of its own to the first client that connects.
func send(path string) error {
	fd, err := create()
	if err != nil {
		return err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		return err
	}
	conn, err := listener.AcceptUnix()
	if err != nil {
		return err
	}
	if _, _, err := conn.WriteMsgUnix([]byte{0}, unix.UnixRights(fd), nil); err != nil {
		return err
	}
	fmt.Println("sent")
	return errors.Join(conn.Close(), listener.Close())
}

// receive prints what came instead of a descriptor. The kernel removes a descriptor that may not be received from the
// message, and marks the message as cut off.
func receive(path string) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	for attempt := 0; err != nil && attempt < 1000; attempt++ { // the sender is still starting
		time.Sleep(10 * time.Millisecond)
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	}
	if err != nil {
		return err
	}
	message, control := make([]byte, 1), make([]byte, unix.CmsgSpace(4))
	n, controlled, flags, _, err := conn.ReadMsgUnix(message, control)
	switch {
	case err != nil:
		return err
	case n == 1 && controlled == 0 && flags&unix.MSG_CTRUNC != 0:
		fmt.Println("cut-off")
	case controlled > 0:
		fmt.Println("ok")
	default:
		fmt.Println("nothing")
	}
	return conn.Close()
}

// use makes a descriptor, calls an ioctl on it, and reads it.
func use() error {
	fd, err := create()
	fmt.Println("create", outcome(err))
	if err != nil {
		return nil //nolint:nilerr // it was said
	}
	api := [3]uint64{uffdAPI}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uffdioAPI, uintptr(unsafe.Pointer(&api)))
	if errno == 0 {
		fmt.Println("ioctl ok")
	} else {
		fmt.Println("ioctl", outcome(errno))
	}
	_, err = unix.Read(fd, make([]byte, 32))
	fmt.Println("read", outcome(err))
	return nil
}

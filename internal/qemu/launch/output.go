// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// QEMU's standard output and error go through a named pipe (fifo(7)) into a log of bounded size. A file alone would be
// unbounded: a guest can make QEMU write as much as it likes.
//
// The pipe must never block or end QEMU. QEMU's own descriptor is open for reading, too, so there is always a reader
// and never a SIGPIPE. It is also non-blocking: what does not fit into a full pipe (64 KiB) is lost. So QEMU can run
// without a daemon. The next daemon opens the pipe by its name and continues the log.
const (
	// logSize is the maximum size of a log in bytes. A full log replaces the old log.
	logSize = 1 << 20
	// logPause is the time between two reads of the pipe. It limits the log of a QEMU that writes without end to 640 KiB
	// per second.
	logPause = 100 * time.Millisecond
	// oldLog is the suffix of the old log. There is one old log per log.
	oldLog    = ".old"
	logSuffix = ".log"
)

// An output writes the output of one QEMU to its log.
type output struct {
	pipePath, logPath string
	pipe              *os.File // non-blocking reading end
	ended             chan struct{}

	mu   sync.Mutex
	log  *os.File
	size int64
	// began is the length of the log before this QEMU's output. It is 0 once that log has become the old one.
	began int64
}

// makePipe makes the pipe. It replaces a pipe that an earlier QEMU left.
func makePipe(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pipe for QEMU's output: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("pipe for QEMU's output: %w", err)
	}
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return fmt.Errorf("pipe for QEMU's output: %s: %w", path, err)
	}
	return nil
}

// writingEnd opens the pipe with the flags that QEMU's descriptor needs.
func writingEnd(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("pipe for QEMU's output: %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openOutput opens the reading end of the pipe and the log. Call follow once QEMU has the pipe open.
func openOutput(pipePath, logPath string) (*output, error) {
	o := &output{pipePath: pipePath, logPath: logPath, ended: make(chan struct{})}
	if err := o.openLog(); err != nil {
		return nil, err
	}
	o.began = o.size
	var err error
	if o.pipe, err = os.OpenFile(pipePath, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("pipe for QEMU's output: %w", err), o.log.Close())
	}
	return o, nil
}

func (o *output) openLog() (err error) {
	if o.log, err = os.OpenFile(o.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY|unix.O_NOFOLLOW, 0o600); err != nil {
		return fmt.Errorf("log of QEMU: %w", err)
	}
	info, err := o.log.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("log of QEMU: %w", err), o.log.Close())
	}
	o.size = info.Size()
	return nil
}

// follow logs QEMU's output until no process has the pipe open for writing.
func (o *output) follow() {
	defer close(o.ended)
	raw, err := o.pipe.SyscallConn()
	// The first drain comes before any wait: if no process has opened the pipe for writing since it was opened here, it
	// never becomes readable.
	for err == nil && !o.drain() {
		time.Sleep(logPause)
		err = raw.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
	}
	_ = o.remove() // if it fails, the next daemon removes the pipe
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = errors.Join(o.pipe.Close(), o.log.Close())
}

// drain logs the content of the pipe. over means that nothing more can come.
func (o *output) drain() (over bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	raw, err := o.pipe.SyscallConn()
	if err != nil {
		return true // closed
	}
	buffer := make([]byte, 16<<10)
	for range 4 * 64 / 16 { // a full pipe and what arrives meanwhile; bounded, because a caller may wait
		var n int
		var readErr error
		if err := raw.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), buffer) }); err != nil {
			return true
		}
		switch {
		case errors.Is(readErr, unix.EAGAIN), errors.Is(readErr, unix.EINTR):
			return false
		case readErr != nil || n == 0:
			return true
		}
		o.write(buffer[:n])
	}
	return false
}

// write appends text to the log. Text that cannot be written, for example on a full disk, is lost. The caller holds mu.
func (o *output) write(text []byte) {
	if o.size+int64(len(text)) > logSize {
		if os.Rename(o.logPath, o.logPath+oldLog) != nil {
			return
		}
		o.began = 0
		_ = o.log.Close()
		if o.openLog() != nil {
			o.size = logSize // so that the next write tries again
			return
		}
	}
	n, _ := o.log.Write(text)
	o.size += int64(n)
}

// lastLines returns the last lines of QEMU's output, joined into one; empty if there are none.
func (o *output) lastLines() string {
	const bytes, lines = 4096, 5
	o.drain()
	o.mu.Lock()
	defer o.mu.Unlock()
	f, err := os.Open(o.logPath)
	if err != nil {
		return ""
	}
	defer f.Close()
	if size, err := f.Seek(0, io.SeekEnd); err != nil || size-o.began > bytes {
		_, _ = f.Seek(-bytes, io.SeekEnd) // if it fails, there is nothing to read
	} else {
		_, _ = f.Seek(min(o.began, size), io.SeekStart) // skips the output of an earlier QEMU
	}
	text, _ := io.ReadAll(f) // a part is better than nothing
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "; ")
}

// discard closes an output whose QEMU was not started, and removes its pipe.
func (o *output) discard() error {
	return errors.Join(o.remove(), o.pipe.Close(), o.log.Close())
}

// remove removes the pipe, unless its path leads to another file by now.
func (o *output) remove() error {
	ours, err := o.pipe.Stat()
	if err != nil {
		return err
	}
	named, err := os.Lstat(o.pipePath)
	if err != nil || !os.SameFile(ours, named) {
		return err
	}
	return os.Remove(o.pipePath)
}

// FollowOutputs continues to log the output of QEMUs that an earlier daemon started. The directory pipes holds their
// pipes. A log in the directory logs has the name of its pipe.
func FollowOutputs(pipes, logs string) error {
	entries, err := os.ReadDir(pipes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		if e.Type() != fs.ModeNamedPipe {
			continue
		}
		o, err := openOutput(filepath.Join(pipes, e.Name()), LogPath(logs, e.Name()))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		go o.follow() // ends at once if its QEMU has ended, and removes the pipe
	}
	return errors.Join(errs...)
}

// LogPath returns the path, in the directory logs, of the log of the QEMU whose pipe has this name.
func LogPath(logs, name string) string { return filepath.Join(logs, name+logSuffix) }

// LimitLogs removes the oldest logs until at most keep are left in the directory logs. It keeps every log whose QEMU
// may still run.
func LimitLogs(pipes, logs string, keep int) error {
	entries, err := filepath.Glob(LogPath(logs, "*"))
	if err != nil || len(entries) <= keep {
		return err
	}
	times := make(map[string]time.Time, len(entries))
	for _, path := range entries {
		if info, err := os.Lstat(path); err == nil {
			times[path] = info.ModTime()
		}
	}
	slices.SortFunc(entries, func(a, b string) int { return times[a].Compare(times[b]) })
	var errs []error
	for _, path := range entries[:len(entries)-keep] {
		name := strings.TrimSuffix(filepath.Base(path), logSuffix)
		if _, err := os.Lstat(filepath.Join(pipes, name)); err == nil {
			continue
		}
		for _, p := range []string{path, path + oldLog} {
			if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// SPDX-License-Identifier: Apache-2.0

package qemu

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

// What a QEMU writes to its standard output and error goes through a pipe with a name (fifo(7)) into a log of bounded size.
// A guest can make QEMU write as much as it likes, so a file would have no bound.
//
// The pipe must never hold QEMU up, nor end it. QEMU itself has it open for reading, too, so that there is always a
// reader and no SIGPIPE, and does not wait for room in it: what does not fit into a full pipe (64 KiB) is lost. It does
// without a daemon that way; the next one opens the pipe by its name and goes on.
const (
	// logSize is how large a log grows before it becomes the old one.
	logSize = 1 << 20
	// logPause is between two emptyings of the pipe: not more than 640 KiB a second of a QEMU that will not stop are logged.
	logPause = 100 * time.Millisecond
	// oldLog is what is appended to a log's name to make the old one's, of which there is one.
	oldLog    = ".old"
	logSuffix = ".log"
)

// An output takes what one QEMU writes.
type output struct {
	pipePath, logPath string
	pipe              *os.File // its reading end, which does not wait
	ended             chan struct{}

	mu   sync.Mutex
	log  *os.File
	size int64
	// began is how long the log was before this QEMU's output, 0 when that log has become the old one.
	began int64
}

// makePipe makes the pipe, in place of one that a QEMU which has ended left.
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

// writingEnd opens the pipe as QEMU is to have it.
func writingEnd(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("pipe for QEMU's output: %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openOutput opens the pipe and the log behind it. follow is to be called once QEMU has the pipe open.
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

// follow takes what comes until nobody has the pipe open for writing any more.
func (o *output) follow() {
	defer close(o.ended)
	raw, err := o.pipe.SyscallConn()
	// At first without a wait: a pipe that nobody has had open for writing since it was opened here never becomes readable.
	for err == nil && !o.drain() {
		time.Sleep(logPause)
		err = raw.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
	}
	_ = o.remove() // a daemon that is started again does
	o.mu.Lock()
	defer o.mu.Unlock()
	_ = errors.Join(o.pipe.Close(), o.log.Close())
}

// drain logs what is in the pipe, and says whether nothing more can come.
func (o *output) drain() (over bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	raw, err := o.pipe.SyscallConn()
	if err != nil {
		return true // closed
	}
	buffer := make([]byte, 16<<10)
	for range 4 * 64 / 16 { // a full pipe, and what comes meanwhile: somebody may wait for this
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

// write appends to the log; what cannot be written, on a full disk say, is lost. The caller holds mu.
func (o *output) write(text []byte) {
	if o.size+int64(len(text)) > logSize {
		if os.Rename(o.logPath, o.logPath+oldLog) != nil {
			return
		}
		o.began = 0
		_ = o.log.Close()
		if o.openLog() != nil {
			o.size = logSize // and try again
			return
		}
	}
	n, _ := o.log.Write(text)
	o.size += int64(n)
}

// lastLines returns the last lines that QEMU wrote in one line; empty if there is none.
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
		_, _ = f.Seek(min(o.began, size), io.SeekStart) // what an earlier QEMU of this log wrote is not this one's
	}
	text, _ := io.ReadAll(f) // what could be read is better than nothing
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "; ")
}

// discard ends an output whose QEMU was not started.
func (o *output) discard() error {
	return errors.Join(o.remove(), o.pipe.Close(), o.log.Close())
}

// remove removes the pipe's name, unless another has it by now.
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

// FollowOutputs goes on logging what QEMUs write that an earlier run of the daemon has started: their pipes are in pipes,
// and a log has its pipe's name.
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

// LogPath is the log, in the directory logs, of the QEMU whose pipe has that name.
func LogPath(logs, name string) string { return filepath.Join(logs, name+logSuffix) }

// LimitLogs removes the oldest logs until there are no more than keep in the directory, but none whose QEMU may still run.
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

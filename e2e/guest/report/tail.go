// SPDX-License-Identifier: Apache-2.0

package report

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

const pollInterval = 10 * time.Millisecond

// tail waits at the end of a growing file.
type tail struct {
	ctx context.Context
	r   io.Reader
}

// Tail returns a reader of r that waits for more at the end of r, as for a serial log that QEMU is still writing. It
// ends with ctx's error.
func Tail(ctx context.Context, r io.Reader) io.Reader { return tail{ctx, r} }

func (t tail) Read(p []byte) (int, error) {
	for {
		n, err := t.r.Read(p)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		select {
		case <-time.After(pollInterval):
		case <-t.ctx.Done():
			return 0, context.Cause(t.ctx)
		}
	}
}

// WaitLine reads r line by line until one matches, and returns that line without its end. For a connection, set a read
// deadline; for a file, wrap it in Tail.
func WaitLine(r *bufio.Reader, match func(line string) bool) (string, error) {
	var last string
	for {
		text, err := r.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("serial line: %w (last line: %q)", err, last)
		}
		last = strings.TrimRight(text, "\r\n")
		if match(last) {
			return last, nil
		}
	}
}

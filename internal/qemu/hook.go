// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	// hookTimeout is how long a hook may take.
	hookTimeout = 30 * time.Second
	// maxHookOutput bounds what it says, in bytes: a definition has some 10 KB.
	maxHookOutput = 1 << 20
)

// A HookCall is what a hook is told: the domain's name, and its definition.
type HookCall struct{ Name, Definition string }

// Hook has the hook change the definition of a domain that comes, as libvirt calls its own for a migration (hooks.rst
// of libvirt, /etc/libvirt/hooks/qemu). It returns the definition where there is no hook, or the hook says nothing.
func (s *Starter) Hook(name, definition string) (string, error) {
	if s == nil { // this process starts QEMUs, and has no hook
		return definition, nil
	}
	var changed string
	if err := s.call("Starts.Hook", HookCall{name, definition}, &changed); err != nil {
		return "", err
	}
	return changed, nil
}

// Hook calls the hook.
func (s *starts) Hook(call HookCall, changed *string) (err error) {
	*changed, err = runHook(s.hook, call)
	return err
}

func runHook(hook string, call HookCall) (string, error) {
	if hook == "" {
		return call.Definition, nil
	}
	if _, err := os.Stat(hook); errors.Is(err, fs.ErrNotExist) {
		return call.Definition, nil
	}
	if culprit, ok := onlyRootWrites(hook); !ok {
		return "", fmt.Errorf("the hook %s: %s can be changed by others than root, so it is not called", hook, culprit)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), hookTimeout, fmt.Errorf("no end within %v", hookTimeout))
	defer cancel()
	// No shell: the name is another host's.
	cmd := exec.CommandContext(ctx, hook, call.Name, "migrate", "begin", "-")
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader(call.Definition)
	out, said := &bounded{left: maxHookOutput}, &bounded{left: 4 << 10}
	cmd.Stdout, cmd.Stderr = out, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with what it has started
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("the hook %s refuses the domain: %w: %s", hook, err, bytes.TrimSpace(said.kept.Bytes()))
	}
	if out.left < 0 {
		return "", fmt.Errorf("the hook %s says more than %d bytes", hook, maxHookOutput)
	}
	if len(bytes.TrimSpace(out.kept.Bytes())) == 0 {
		return call.Definition, nil
	}
	return out.kept.String(), nil
}

// bounded keeps so many bytes of what is written, and takes all. The buffer is no embedded one, whose ReadFrom would
// take more.
type bounded struct {
	kept bytes.Buffer
	left int // negative: there was more
}

func (b *bounded) Write(p []byte) (int, error) {
	b.kept.Write(p[:min(len(p), max(0, b.left))])
	b.left -= len(p)
	return len(p), nil
}

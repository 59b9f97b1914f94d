// SPDX-License-Identifier: Apache-2.0

package launch

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

	"github.com/migrated-vm/migrated/internal/owned"
)

const (
	// hookTimeout bounds how long a hook may run.
	hookTimeout = 30 * time.Second
	// maxHookOutput bounds the output of a hook, in bytes. A definition has about 10 KB.
	maxHookOutput = 1 << 20
)

// A HookCall holds the input of a hook: the domain's name and its definition.
type HookCall struct{ Name, Definition string }

// Hook lets the hook change the definition of an incoming domain, as libvirt does with its own hook for a migration
// (hooks.rst of libvirt, /etc/libvirt/hooks/qemu). It returns the changed definition, or the given one if there is no
// hook or the hook prints nothing.
func (s *Starter) Hook(name, definition string) (string, error) {
	if s == nil { // whether there is a hook is not known
		return "", errors.New("this daemon has no process that would call the hook for the domain")
	}
	var changed string
	if err := s.call("Starts.Hook", HookCall{name, definition}, &changed); err != nil {
		return "", err
	}
	return changed, nil
}

// Hook runs the hook in the Starter's process.
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
	if culprit, ok := owned.ByRoot(hook); !ok {
		return "", fmt.Errorf("the hook %s: %s can be changed by others than root, so it is not called", hook, culprit)
	}
	ctx, cancel := context.WithTimeoutCause(context.Background(), hookTimeout, fmt.Errorf("no end within %v", hookTimeout))
	defer cancel()
	// Without a shell, because the name comes from another host.
	cmd := exec.CommandContext(ctx, hook, call.Name, "migrate", "begin", "-")
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader(call.Definition)
	out, said := &bounded{left: maxHookOutput}, &bounded{left: 4 << 10}
	cmd.Stdout, cmd.Stderr = out, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // the whole process group
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		words := bytes.TrimSpace(said.kept.Bytes())
		switch {
		case ctx.Err() != nil:
			return "", fmt.Errorf("the hook %s: %w", hook, context.Cause(ctx))
		case !errors.As(err, &exit):
			return "", fmt.Errorf("the hook %s cannot be executed: %w", hook, err)
		case len(words) == 0:
			return "", fmt.Errorf("the hook %s refuses the domain: %w", hook, err)
		}
		return "", fmt.Errorf("the hook %s refuses the domain: %s (%w)", hook, words, err)
	}
	if out.left < 0 {
		return "", fmt.Errorf("the hook %s says more than %d bytes", hook, maxHookOutput)
	}
	if len(bytes.TrimSpace(out.kept.Bytes())) == 0 {
		return call.Definition, nil
	}
	return out.kept.String(), nil
}

// bounded keeps the first bytes that are written and discards the rest. The buffer is not embedded: its ReadFrom would
// bypass the limit.
type bounded struct {
	kept bytes.Buffer
	left int // negative: there was more
}

func (b *bounded) Write(p []byte) (int, error) {
	b.kept.Write(p[:min(len(p), max(0, b.left))])
	b.left -= len(p)
	return len(p), nil
}

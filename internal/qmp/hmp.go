// SPDX-License-Identifier: Apache-2.0

package qmp

import "context"

// HMP runs a command of the human monitor, for which there is none in QMP, and returns what QEMU prints.
func (c *Client) HMP(ctx context.Context, line string) (text string, err error) {
	err = c.Do(ctx, "human-monitor-command", map[string]string{"command-line": line}, &text)
	return text, err
}

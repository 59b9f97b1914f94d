// SPDX-License-Identifier: Apache-2.0

package launch

// Constants of the log, and functions of a start, for the tests.
const (
	LogSize = logSize
	OldLog  = oldLog
)

var (
	Listener      = listener
	MakePipe      = makePipe
	RemovePIDFile = removePIDFile
)

// LaunchAlone starts a QEMU whose output nobody reads.
func LaunchAlone(opts Options) (pid int, wait func() error, err error) {
	c, err := launch(opts)
	return c.pid, c.wait, err
}

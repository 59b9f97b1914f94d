// SPDX-License-Identifier: Apache-2.0

package lab_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/lab"
)

// vmPatience limits the total time that a test waits.
const vmPatience = 4 * time.Minute

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), vmPatience)
	t.Cleanup(cancel)
	return ctx
}

// stage makes a lab that ends with the test.
func stage(t *testing.T) *lab.Lab {
	t.Helper()
	l := newLab(t)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Errorf("end of the lab: %v", err)
		}
	})
	return l
}

// startVM starts a VM. If the test fails, it shows QEMU's output.
func startVM(t *testing.T, h *lab.Host, c lab.VMConfig, extra ...string) *lab.Process {
	t.Helper()
	showOutput(t, h)
	p, err := h.StartVM(testContext(t), c, extra...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// showOutput shows what the host's QEMU and its guest have written, if the test fails.
func showOutput(t *testing.T, h *lab.Host) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			for _, name := range []string{lab.VMDir + "/qemu.log", lab.ConsoleLog} {
				text, _ := os.ReadFile(h.Path(name))
				t.Logf("%s on host %s: %s", name, h.Name, text)
			}
		}
	})
}

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
)

func TestZZ(t *testing.T) {
	for _, d := range []int{0, 1, 8} {
		t.Run(fmt.Sprint(d), func(t *testing.T) {
			l := newHosts(t)
			var logs []string
			for _, h := range []*lab.Host{l.A, l.B} {
				log, _ := os.Create(filepath.Join(t.TempDir(), h.Name))
				if v := os.Getenv("QV"); v != "" {
					useQEMU(t, h, v)
				}
				if _, err := h.StartDaemon(testContext(t), log); err != nil {
					t.Fatal(err)
				}
				logs = append(logs, log.Name())
			}
			kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			vm := lab.RealVM(kernel, initrd, 256, d, d, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
			if b := os.Getenv("BK"); b != "" {
				vm.Backend = lab.Backend(b)
			}
			if os.Getenv("IDLE") != "" {
				vm.KernelArgs = append(vm.KernelArgs, "migrated.disks=0", "migrated.nets=0", "migrated.pattern=idle")
			}
			startVM(t, l.A, vm)
			var guest report.Log
			port := openGuest(t, l.A, &guest)
			if _, err := guest.WaitReady(testContext(t)); err != nil {
				t.Fatal(err)
			}
			awaitWindows(t, &guest, 3)
			port.Close()
			from, to := l.A, l.B
			for hop := range 6 {
				m := migrate(t, from, to, fmt.Sprintf("hop-%d", hop))
				t.Logf("downtime %v faults %d p50 %v", m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetFaults(), m.GetProgress().GetFaultP50().AsDuration())
				from, to = to, from
			}
			for _, name := range logs {
				text, _ := os.ReadFile(name)
				for _, m := range regexp.MustCompile(`bytes=.*`).FindAllString(string(text), -1) {
					t.Log(m)
				}
			}
		})
	}
}

// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/migrated-vm/migrated/e2e/guest/report"
	"github.com/migrated-vm/migrated/e2e/image"
	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd/uffdtest"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
	"google.golang.org/protobuf/types/known/durationpb"
)

// TestAnyRAM moves a VM with disks and network cards from one kind of memory to the next, on each version of QEMU. Each
// kind is a source and a destination once; every page and every block is checked after each move.
func TestAnyRAM(t *testing.T) {
	t.Parallel()
	kinds := []lab.Backend{lab.BackendDefault} // the kind that most VMs have, first and last
	for _, kind := range lab.Backends() {
		if kind != lab.BackendDefault {
			kinds = append(kinds, kind)
		}
	}
	kinds = append(kinds, lab.BackendDefault)
	for _, version := range lab.QEMUVersions {
		t.Run(version, func(t *testing.T) { goThrough(t, version, kinds, false) })
	}
}

// TestAnyHugeRAM is TestAnyRAM with huge pages.
func TestAnyHugeRAM(t *testing.T) {
	// The two hosts' VMs, and the memory file that is left when its QEMU has ended.
	uffdtest.ReserveHugePages(t, 3*128+32)
	kinds := []lab.Backend{
		lab.BackendFile, lab.BackendMemfd, lab.BackendMemfdPrivate, lab.BackendFilePrivate, lab.BackendFile,
	}
	goThrough(t, lab.InstalledQEMU, kinds, true)
}

// TestGiganticRAM moves a VM whose memory is one page of 1 GiB there and back. The page arrives in parts, and is
// installed as a whole.
func TestGiganticRAM(t *testing.T) {
	reserveGiganticPages(t, 2)
	for name, backend := range map[string]string{
		"memfd": "memory-backend-memfd,share=on", "private": "memory-backend-memfd,share=off",
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			s := sceneOf(t, l, lab.VMConfig{Backend: lab.BackendDefault, MemoryMiB: 1024, Extra: []string{
				"-object", backend + ",id=ram0,size=1G,hugetlb=on,hugetlbsize=1G", "-machine", "memory-backend=ram0",
			}}.WithDevices(1, 1))
			from, to, pass := l.A, l.B, s.began
			for hop := range 2 {
				m := s.migrateGigantic(from, to, fmt.Sprintf("hop-%d", hop))
				pass = s.arrivedAfter(to, pass)
				t.Logf("downtime %v, fault max %v",
					m.GetProgress().GetDowntime().AsDuration(), m.GetProgress().GetFaultMax().AsDuration())
				from, to = to, from
			}
		})
	}
}

// migrateGigantic moves a VM whose devices' state needs a page of 1 GiB. On a busy machine, fetching that page takes
// longer than a VM may be stopped by default.
func (s *scene) migrateGigantic(from, to *lab.Host, id string) *migratedv1.Migration {
	s.Helper()
	return completed(s.T, migrateSpec(s.T, from, id, &migratedv1.MigrationSpec{
		Vm: lab.QMPPath, Destination: to.DaemonAddr(), FreezeLimit: durationpb.New(2 * time.Minute),
	}))
}

// reserveGiganticPages reserves n pages of 1 GiB for this test. It skips the test on a machine that has no pages of
// this size, or not so much contiguous memory.
func reserveGiganticPages(t *testing.T, n int) {
	t.Helper()
	const size = 1 << 30
	before, err := testenv.HugePages(size)
	if err != nil {
		t.Skipf("no pages of 1 GiB on this machine: %v", err)
	}
	t.Cleanup(func() {
		if _, err := testenv.SetHugePages(size, before); err != nil {
			t.Errorf("give the pages back: %v", err)
		}
	})
	if now, err := testenv.SetHugePages(size, n); err != nil || now < n {
		t.Skipf("%d of %d pages of 1 GiB can be reserved (%v)", now, n, err)
	}
}

// goThrough boots a VM with the first kind of memory and moves it to each of the other kinds in turn.
func goThrough(t *testing.T, version string, kinds []lab.Backend, huge bool) {
	t.Helper()
	l := newHosts(t)
	for _, h := range l.Hosts() {
		useQEMU(t, h, version)
		startDaemon(t, h)
	}
	kernel, initrd, err := image.LinuxWithVirtio(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	vm := lab.RealVM(kernel, initrd, 256, 1, 1, "migrated.mem=64", "migrated.workers=1", "migrated.rate=500")
	vm.HugePages = huge
	vm.Backend = kinds[0]
	// If the VM was started without a memory backend, its RAM block has QEMU's default name. The destination must use
	// the same name.
	rename := strings.NewReplacer()
	if kinds[0] == lab.BackendDefault {
		rename = strings.NewReplacer("id=ram0", "id=pc.ram", "memory-backend=ram0", "memory-backend=pc.ram")
	}
	var guest report.Log
	port := bootLinux(t, l.A, vm, &guest)
	from, to := l.A, l.B
	for i, kind := range kinds[1:] {
		awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		if err := port.Close(); err != nil {
			t.Fatal(err)
		}
		vm.Backend = kind
		if err := os.WriteFile(
			to.Path(templatePath), []byte(rename.Replace(strings.Join(vm.Args(), "\n"))), 0o600,
		); err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("%s-to-%s", kinds[i], kind)
		m := completed(t, migrateSpec(t, from, id, &migratedv1.MigrationSpec{
			Vm: lab.QMPPath, Destination: to.DaemonAddr(), DestinationTemplate: templatePath,
		}))
		checkFigures(t, m)
		checkVersion(t, to, version)
		port = openGuest(t, to, &guest)
		awaitBlocks(t, &guest, writesOf(guest.Disks())+50)
		verified := verifyLinux(t, &guest, port)
		t.Logf("%s: downtime %v, %d faults, p50 %v, %d blocks checked", id, m.GetProgress().GetDowntime().AsDuration(),
			m.GetProgress().GetFaults(), m.GetProgress().GetFaultP50().AsDuration(), verified.Blocks)
		from, to = to, from
	}
	if err := port.Close(); err != nil {
		t.Error(err)
	}
}

// writesOf returns the number of writes to the disk with the fewest.
func writesOf(disks []report.Disk) (least uint64) {
	for i, d := range disks {
		if i == 0 || d.Writes < least {
			least = d.Writes
		}
	}
	return least
}

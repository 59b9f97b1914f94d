// SPDX-License-Identifier: Apache-2.0

// Package examples has programs that use the packages of pkg/ from outside, and tests of them. The tests build
// the programs in another module, where nothing internal can be imported.
package examples

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/pkg/testenv"
	"github.com/migrated-vm/migrated/pkg/uffd"
	"github.com/migrated-vm/migrated/pkg/uffd/handover"
)

const (
	pageSize = 4096
	pages    = 256
	patience = 2 * time.Minute // limits every wait: then the test fails
)

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "monitor" {
		if err := monitor(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestNothingInternal checks that no package below pkg/, and no test of one, imports a package below internal/.
func TestNothingInternal(t *testing.T) {
	const internal = "github.com/migrated-vm/migrated/internal/"
	out := run(t, ".", "go", "list", "-f",
		`{{$p := .ImportPath}}{{range .Imports}}{{$p}} {{.}}{{"\n"}}{{end}}`+
			`{{range .TestImports}}{{$p}} {{.}}{{"\n"}}{{end}}{{range .XTestImports}}{{$p}} {{.}}{{"\n"}}{{end}}`, "../...")
	seen := 0
	for line := range strings.Lines(out) {
		if imported := strings.Fields(line); len(imported) == 2 {
			seen++
			if strings.HasPrefix(imported[1], internal) {
				t.Errorf("%s imports %s", imported[0], imported[1])
			}
		}
	}
	if seen == 0 {
		t.Error("nothing was looked at")
	}
}

// outside builds the programs in another module, and returns the directory of the binaries.
func outside(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	module, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, program := range []string{"snapshot", "process", "mover"} {
		if err := os.CopyFS(filepath.Join(dir, program), os.DirFS(program)); err != nil {
			t.Fatal(err)
		}
	}
	// The other module uses the same versions as this one, so that nothing has to be looked up.
	_, needs, found := bytes.Cut(module, []byte("\n"))
	if !found {
		t.Fatal("go.mod has one line")
	}
	text := fmt.Sprintf("module example.com/outside\n%s\nrequire github.com/migrated-vm/migrated v0.0.0\n"+
		"replace github.com/migrated-vm/migrated => %s\n", needs, root)
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	sums, err := os.ReadFile(filepath.Join(root, "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "go.sum"), sums, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, dir, "go", "build", "-mod=mod", "-o", dir+"/bin/", "./...")
	return filepath.Join(dir, "bin")
}

// run runs a program in a directory to its end, and returns its output.
func run(t *testing.T, dir, program string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", program, args, err, out, stderr.String())
	}
	return string(out)
}

// memoryFile makes a file of pages. Every fifth page is zeros, the others have content.
func memoryFile(t *testing.T) (path string, content []byte) {
	t.Helper()
	content = make([]byte, pages*pageSize)
	for p := range pages {
		if p%5 != 0 {
			for i := range pageSize {
				content[p*pageSize+i] = byte(p*7 + i)
			}
		}
	}
	path = filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func needUserfaultfd(t *testing.T) {
	t.Helper()
	u, err := uffd.Open(uffd.OpenOptions{})
	if err != nil {
		testenv.CannotRun(t, "userfaultfd: %v", err)
	}
	if err := u.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestPrograms(t *testing.T) {
	needUserfaultfd(t)
	bin := outside(t)

	// A process that runs while its memory comes from the source reads the source's content.
	t.Run("process", func(t *testing.T) {
		path, content := memoryFile(t)
		source := exec.CommandContext(t.Context(), filepath.Join(bin, "process"), "source", "127.0.0.1:0", path)
		said, err := source.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := source.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = source.Process.Kill()
			_ = source.Wait()
		})
		address, err := bufio.NewReader(said).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		got := run(
			t, t.TempDir(), filepath.Join(bin, "process"), "destination", strings.TrimSpace(address), fmt.Sprint(len(content)),
		)
		if want := fmt.Sprintf("%08x\n", crc32.ChecksumIEEE(content)); got != want {
			t.Errorf("the process has read %q, want %q", got, want)
		}
	})

	// A monitor that hands its memory over reads the snapshot's content, and zeros in the page that it gave up.
	t.Run("snapshot", func(t *testing.T) {
		path, content := memoryFile(t)
		socket := filepath.Join(t.TempDir(), "socket")
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		handler := exec.CommandContext(ctx, filepath.Join(bin, "snapshot"), socket, path)
		handler.Stderr = os.Stderr
		if err := handler.Start(); err != nil {
			t.Fatal(err)
		}
		got := run(t, t.TempDir(), os.Args[0], "monitor", socket)
		if err := handler.Wait(); err != nil {
			t.Errorf("the handler: %v", err)
		}
		given := bytes.Clone(content)
		clear(given[givenUp*pageSize : (givenUp+1)*pageSize])
		if want := fmt.Sprintf("%08x\n%08x\n", crc32.ChecksumIEEE(content), crc32.ChecksumIEEE(given)); got != want {
			t.Errorf("the monitor has read %q, want %q", got, want)
		}
	})
}

// givenUp is the page that the monitor gives up.
const givenUp = 42

// monitor acts as a virtual machine monitor. It maps memory whose pages are all missing, hands its userfaultfd over,
// reads the memory, gives a page up as a balloon does, and reads the memory again.
func monitor(socket string) error {
	memory, err := unix.Mmap(-1, 0, pages*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	if err := unix.Madvise(memory, unix.MADV_DONTFORK); err != nil {
		return err
	}
	u, err := uffd.Open(uffd.OpenOptions{NonBlocking: true})
	if err != nil {
		return err
	}
	if _, _, err := u.API(uffd.FeatureEventRemove); err != nil {
		return err
	}
	m := handover.Mapping{
		BaseHostVirtAddr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory)))),
		Size:             pages * pageSize,
		PageSize:         pageSize,
	}
	if _, err := u.Register(m.Range(), uffd.ModeMissing); err != nil {
		return err
	}
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := handover.Send(context.Background(), conn, []handover.Mapping{m}, u); err != nil {
		return err
	}
	fmt.Printf("%08x\n", crc32.ChecksumIEEE(memory))
	if err := unix.Madvise(memory[givenUp*pageSize:(givenUp+1)*pageSize], unix.MADV_DONTNEED); err != nil {
		return err
	}
	fmt.Printf("%08x\n", crc32.ChecksumIEEE(memory))
	return nil
}

// dial connects to the handler's socket. It repeats the attempt, because the handler may not listen yet.
func dial(socket string) (conn *net.UnixConn, err error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
		if err == nil || time.Now().After(deadline) {
			return conn, err
		}
	}
}

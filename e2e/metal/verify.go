// SPDX-License-Identifier: Apache-2.0

package metal

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// Result says how far a stopped guest had counted.
type Result struct {
	// Pass is the pass that the guest was in, counted from 1; 0 if it had not begun.
	Pass uint32
	// Position is the address of the first page that it had not reached in that pass.
	Position uint32
	// Pages is how many pages were checked.
	Pages int
}

// ErrDamaged is the error that each PageError wraps.
var ErrDamaged = errors.New("guest memory is damaged")

// PageError is one page that does not hold what the guest wrote.
type PageError struct {
	Address uint32
	Detail  string
}

func (e *PageError) Error() string { return fmt.Sprintf("page at %#x: %s", e.Address, e.Detail) }

func (e *PageError) Unwrap() error { return ErrDamaged }

// maxErrors is how many damaged pages Verify describes at most.
const maxErrors = 16

// Verify checks the whole RAM of a stopped guest. ramFiles are its memory backends' files in the order of guest
// addresses, on tmpfs or hugetlbfs. Damaged pages are PageErrors, joined. The files are read and not mapped, so that
// their holes stay holes.
func Verify(ramFiles ...string) (Result, error) {
	var size int64
	var files []*os.File
	var parts []io.Reader
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, path := range ramFiles {
		f, err := os.Open(path)
		if err != nil {
			return Result{}, fmt.Errorf("guest RAM: %w", err)
		}
		files = append(files, f)
		info, err := f.Stat()
		if err != nil {
			return Result{}, fmt.Errorf("guest RAM: %w", err)
		}
		size += info.Size()
		parts = append(parts, f)
	}
	return verify(bufio.NewReaderSize(io.MultiReader(parts...), 1<<20), size)
}

// verify checks size bytes of RAM, read from the start.
func verify(ram io.Reader, size int64) (Result, error) {
	end, err := End(int(size >> 20))
	if err != nil {
		return Result{}, err
	}
	var v verifier
	p := make([]byte, pageSize)
	for address := uint32(0); address < end; address += pageSize {
		if _, err := io.ReadFull(ram, p); err != nil {
			return Result{}, fmt.Errorf("guest RAM at %#x: %w", address, err)
		}
		if address >= First {
			v.page(address, p)
		}
	}
	if !v.dropped {
		v.result.Position = end // the pass was complete
	}
	return v.result, errors.Join(v.errs...)
}

type verifier struct {
	result  Result
	dropped bool // the counter went from pass to pass-1
	errs    []error
}

func (v *verifier) fail(address uint32, format string, args ...any) {
	if len(v.errs) < maxErrors {
		v.errs = append(v.errs, &PageError{address, fmt.Sprintf(format, args...)})
	}
}

// page checks the next page in the order of addresses.
func (v *verifier) page(address uint32, p []byte) {
	slot := address / pageSize % 512 * 8
	counter := binary.LittleEndian.Uint32(p[slot:])
	named := binary.LittleEndian.Uint32(p[slot+4:])

	v.result.Pages++
	if v.result.Pages == 1 {
		v.result.Pass = counter
	}
	pass := v.result.Pass
	switch {
	case counter == pass && !v.dropped:
	case counter == pass-1 && pass > 0:
		if !v.dropped {
			v.dropped = true
			v.result.Position = address
		}
	case v.dropped:
		v.fail(address, "counter is %d, must be %d: the guest is at %#x in pass %d", counter, pass-1, v.result.Position, pass)
	default:
		v.fail(address, "counter is %d, must be %d or %d", counter, pass, pass-1)
	}

	// The guest writes the name just after it first counts, so the page at which it stopped may lack it.
	switch want := address ^ name; {
	case named == want && counter > 0:
	case named == 0 && counter <= 1 && pass <= 1:
	default:
		v.fail(address, "is named %#x, must be %#x", named^name, address)
	}
	for i := 0; i < pageSize; i += 8 {
		if w := binary.LittleEndian.Uint64(p[i:]); w != 0 && uint32(i) != slot {
			v.fail(address, "offset %#x holds %#x, must be zero", i, w)
			return
		}
	}
}

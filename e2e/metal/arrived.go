// SPDX-License-Identifier: Apache-2.0

package metal

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
)

// Arrived checks the RAM of a guest, which may run meanwhile, in one file. Every page in which the guest counts must
// have been counted to pass at least, and hold its own name. A migration owes that to a guest that had written that
// pass before it, whatever the vCPU does afterwards. It returns a PageError for the first page that lacks it.
func Arrived(ramFile string, pass uint32) error {
	f, err := os.Open(ramFile)
	if err != nil {
		return fmt.Errorf("guest RAM: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("guest RAM: %w", err)
	}
	return arrived(bufio.NewReaderSize(f, 1<<20), info.Size(), pass)
}

func arrived(ram io.Reader, size int64, pass uint32) error {
	end, err := End(int(size >> 20))
	if err != nil {
		return err
	}
	p := make([]byte, pageSize)
	for address := uint32(0); address < end; address += pageSize {
		if _, err := io.ReadFull(ram, p); err != nil {
			return fmt.Errorf("guest RAM at %#x: %w", address, err)
		}
		if address < First {
			continue
		}
		slot := address / pageSize % 512 * 8
		counter := binary.LittleEndian.Uint32(p[slot:])
		if named := binary.LittleEndian.Uint32(p[slot+4:]); counter < pass || counter > 0 && named != address^name {
			return &PageError{address, fmt.Sprintf("counter is %d, must be %d or more; named %#x", counter, pass, named^name)}
		}
	}
	return nil
}

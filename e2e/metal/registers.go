// SPDX-License-Identifier: Apache-2.0

package metal

import (
	"fmt"
	"regexp"
	"strconv"
)

// Registers are the registers of a stopped guest that tell how far it has counted.
type Registers struct {
	EBX uint32 // the pass
	EDI uint32 // the page, while it counts
	EIP uint32
}

// Addresses in boot.S that tell what the guest is doing.
const (
	nextPage = 0x7c00 + 0x80
	nextLine = 0x7c00 + 0xc0
)

var register = regexp.MustCompile(`\b[ER](BX|DI|IP)=([0-9a-fA-F]+)`)

// ParseRegisters parses the output of QEMU's "info registers".
func ParseRegisters(text string) (Registers, error) {
	values := make(map[string]uint32)
	for _, m := range register.FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseUint(m[2], 16, 64)
		if err != nil {
			return Registers{}, fmt.Errorf("register %s: %w", m[0], err)
		}
		values[m[1]] = uint32(n)
	}
	if len(values) != 3 {
		return Registers{}, fmt.Errorf("these are not the registers of an x86 CPU: %.200q", text)
	}
	return Registers{values["BX"], values["DI"], values["IP"]}, nil
}

// Meets returns a PageError unless memory is exactly as far as the guest is; end is what End returns. Memory that is
// consistent in itself may still lack the guest's last writes, or be from before them.
func (r Result) Meets(at Registers, end uint32) error {
	var met bool
	switch {
	case at.EIP >= nextPage && at.EIP < nextLine:
		// The guest may have counted the page at edi, or the whole pass, without having advanced edi yet.
		met = r.Pass == at.EBX && (r.Position == at.EDI || r.Position == at.EDI+pageSize) ||
			at.EDI == First && r.Pass == at.EBX-1 && r.Position == end
	case at.EIP >= nextLine:
		met = r.Pass == at.EBX && r.Position == end
	default: // between two passes, before or after ebx was incremented
		met = (r.Pass == at.EBX || r.Pass == at.EBX-1) && r.Position == end
	}
	if met {
		return nil
	}
	return &PageError{r.Position, fmt.Sprintf(
		"memory is of pass %d up to here, but the guest is in pass %d at %#x (eip %#x)",
		r.Pass, at.EBX, at.EDI, at.EIP,
	)}
}

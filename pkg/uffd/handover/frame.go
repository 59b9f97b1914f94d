// SPDX-License-Identifier: Apache-2.0

package handover

import "fmt"

// maxMessage limits the JSON text, in bytes. It is room for some 400 mappings; a virtual machine has a handful.
const maxMessage = 64 << 10

// frame collects a message that may come in any number of pieces. The protocol has no length, and the peer need
// not close the connection: the message ends with the bracket that closes the array.
type frame struct {
	text     []byte
	depth    int
	inString bool
	escaped  bool
	done     bool
}

// add takes the next piece and reports whether the message is complete. It looks at each byte once.
func (f *frame) add(piece []byte) (done bool, err error) {
	if len(f.text)+len(piece) > maxMessage {
		return false, fmt.Errorf("%w: longer than %d bytes", ErrInvalid, maxMessage)
	}
	f.text = append(f.text, piece...)
	for _, c := range piece {
		if err := f.step(c); err != nil {
			return false, err
		}
	}
	return f.done, nil
}

func (f *frame) step(c byte) error {
	switch {
	case f.escaped:
		f.escaped = false
	case f.inString:
		f.escaped = c == '\\'
		f.inString = c != '"'
	case c == ' ' || c == '\t' || c == '\n' || c == '\r':
	case f.done:
		return fmt.Errorf("%w: something follows the array", ErrInvalid)
	case f.depth == 0 && c != '[':
		return fmt.Errorf("%w: it does not begin with an array", ErrInvalid)
	case c == '"':
		f.inString = true
	case c == '[' || c == '{':
		f.depth++
		if f.depth > 2 { // an array of objects of numbers
			return fmt.Errorf("%w: nested too deep", ErrInvalid)
		}
	case c == ']' || c == '}':
		f.depth--
		f.done = f.depth == 0
	}
	return nil
}

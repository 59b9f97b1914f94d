// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// decode reads the JSON array. encoding/json alone is too lenient for a peer that is not trusted: it accepts
// duplicate keys, keys in another case, and null as a number. It also ignores unknown keys, which may change the
// meaning of the others.
func decode(text []byte) ([]Mapping, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber() // a float64 has only 53 bits
	if err := delim(d, '['); err != nil {
		return nil, err
	}
	var mappings []Mapping
	for d.More() {
		m, err := decodeMapping(d)
		if err != nil {
			return nil, fmt.Errorf("mapping %d: %w", len(mappings), err)
		}
		mappings = append(mappings, m)
	}
	if err := delim(d, ']'); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: something follows the array", ErrInvalid)
	}
	return mappings, checkAll(mappings)
}

// decodeMapping reads one object.
func decodeMapping(d *json.Decoder) (Mapping, error) {
	var m Mapping
	var pageSizeKiB uint64
	fields := map[string]*uint64{
		"base_host_virt_addr": &m.BaseHostVirtAddr,
		"size":                &m.Size,
		"offset":              &m.Offset,
		"page_size":           &m.PageSize,
		"page_size_kib":       &pageSizeKiB,
	}
	seen := map[string]bool{}
	if err := delim(d, '{'); err != nil {
		return m, err
	}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return m, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		key, _ := token.(string) // the decoder returns nothing else here
		field := fields[key]
		switch {
		case field == nil:
			return m, fmt.Errorf("%w: unknown field %.40q", ErrInvalid, key)
		case seen[key]:
			return m, fmt.Errorf("%w: field %s occurs twice", ErrInvalid, key)
		}
		seen[key] = true
		if *field, err = number(d); err != nil {
			return m, fmt.Errorf("%s: %w", key, err)
		}
	}
	if err := delim(d, '}'); err != nil {
		return m, err
	}

	for _, key := range []string{"base_host_virt_addr", "size", "offset"} {
		if !seen[key] {
			return m, fmt.Errorf("%w: field %s is missing", ErrInvalid, key)
		}
	}
	switch {
	case !seen["page_size"] && !seen["page_size_kib"]:
		return m, fmt.Errorf("%w: field page_size is missing", ErrInvalid)
	case !seen["page_size"]:
		m.PageSize = pageSizeKiB // bytes, see the package comment
	case seen["page_size_kib"] && pageSizeKiB != m.PageSize:
		return m, fmt.Errorf("%w: page_size %d and page_size_kib %d (which is in bytes, too) differ",
			ErrInvalid, m.PageSize, pageSizeKiB)
	}
	return m, nil
}

// delim reads one bracket.
func delim(d *json.Decoder, want json.Delim) error {
	token, err := d.Token()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if token != want {
		return fmt.Errorf("%w: %.40q where %q belongs", ErrInvalid, fmt.Sprint(token), want.String())
	}
	return nil
}

// number reads a 64-bit integer without a sign, a fraction or an exponent.
func number(d *json.Decoder) (uint64, error) {
	token, err := d.Token()
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	n, ok := token.(json.Number)
	if !ok {
		return 0, fmt.Errorf("%w: not a number", ErrInvalid)
	}
	v, err := strconv.ParseUint(n.String(), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: %.40q is not an integer of 64 bits", ErrInvalid, n.String())
	}
	return v, nil
}

// encode is the inverse of decode, with both names of the page size.
func encode(mappings []Mapping) ([]byte, error) {
	type wire struct {
		BaseHostVirtAddr uint64 `json:"base_host_virt_addr"`
		Size             uint64 `json:"size"`
		Offset           uint64 `json:"offset"`
		PageSize         uint64 `json:"page_size"`
		PageSizeKiB      uint64 `json:"page_size_kib"`
	}
	if err := checkAll(mappings); err != nil {
		return nil, err
	}
	out := make([]wire, len(mappings))
	for i, m := range mappings {
		out[i] = wire{m.BaseHostVirtAddr, m.Size, m.Offset, m.PageSize, m.PageSize}
	}
	return json.Marshal(out)
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// An entry is a line of a daemon's log: its attributes, by their names.
type entry map[string]string

// attribute matches an attribute in log/slog's text format: key=value, or key="quoted value".
var attribute = regexp.MustCompile(`([^ =]+)=("(?:[^"\\]|\\.)*"|[^ ]*)`)

func parseEntry(line string) entry {
	e := entry{}
	for _, match := range attribute.FindAllStringSubmatch(line, -1) {
		value := match[2]
		if text, err := strconv.Unquote(value); err == nil && strings.HasPrefix(value, `"`) {
			value = text
		}
		e[match[1]] = value
	}
	return e
}

// findEntry returns the last entry with that message about a migration in a daemon's log.
func findEntry(path, migration, message string) (entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found entry
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if e := parseEntry(lines.Text()); e["migration"] == migration && e["msg"] == message {
			found = e
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if found == nil {
		return nil, fmt.Errorf("%s: of migration %s it does not say that %q", path, migration, message)
	}
	return found, nil
}

// duration returns an attribute in milliseconds.
func (e entry) duration(key string) (float64, error) {
	d, err := time.ParseDuration(e[key])
	if err != nil {
		return 0, fmt.Errorf("log entry %q has no %s: %w", e["msg"], key, err)
	}
	return ms(d), nil
}

// number returns an attribute that counts something.
func (e entry) number(key string) (float64, error) {
	n, err := strconv.ParseFloat(e[key], 64)
	if err != nil {
		return 0, fmt.Errorf("log entry %q has no %s: %w", e["msg"], key, err)
	}
	return n, nil
}

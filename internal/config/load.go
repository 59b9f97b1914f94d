// SPDX-License-Identifier: Apache-2.0

package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// A FileError is one mistake in a configuration file.
type FileError struct {
	Path string // of the file
	Line int    // 1 for the first; 0: the file as a whole
	Text string // what is wrong and what is right
}

// Error returns "PATH:LINE: TEXT", the form that editors jump to.
func (e *FileError) Error() string {
	if e.Line == 0 {
		return e.Path + ": " + e.Text
	}
	return fmt.Sprintf("%s:%d: %s", e.Path, e.Line, e.Text)
}

// Load returns the defaults overridden by the YAML file at path. Its error
// joins a [FileError] for each mistake, or wraps [os.ErrNotExist] and the like.
// Load does not call [Config.Validate]: flags may yet override a value.
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("reading the configuration: %w", err)
	}
	return parse(path, data)
}

func parse(path string, data []byte) (Config, error) {
	cfg := Default()
	loader, err := yaml.NewLoader(bytes.NewReader(data))
	if err != nil {
		return Config{}, fmt.Errorf("reading %s: %w", path, err)
	}
	var document yaml.Node
	if err := loader.Load(&document); errors.Is(err, io.EOF) {
		return cfg, nil // nothing but comments
	}
	err = yaml.Load(data, &cfg, yaml.WithKnownFields())
	if err == nil {
		return cfg, nil
	}
	keys := keyPositions(&document)
	var several *yaml.LoadErrors
	var one *yaml.LoadError
	var mistakes []error
	switch {
	case errors.As(err, &several):
		for _, e := range several.Errors {
			mistakes = append(mistakes, &FileError{path, e.Mark.Line, explain(keys, e)})
		}
	case errors.As(err, &one):
		mistakes = append(mistakes, &FileError{path, one.Mark.Line, "this is not YAML: " + one.Message})
	default:
		mistakes = append(mistakes, &FileError{path, 0, err.Error()})
	}
	return Config{}, errors.Join(mistakes...)
}

// position is where a key of the file stands.
type position struct {
	name         string
	line, column int
	value        *yaml.Node
}

// keyPositions lists the top-level keys of the file in the order in which they
// stand there. The decoder's errors have positions but no key names.
func keyPositions(document *yaml.Node) []position {
	top := document
	if top.Kind == yaml.DocumentNode && len(top.Content) > 0 {
		top = top.Content[0]
	}
	if top.Kind != yaml.MappingNode {
		return nil
	}
	var keys []position
	for i := 0; i+1 < len(top.Content); i += 2 {
		k := top.Content[i]
		keys = append(keys, position{k.Value, k.Line, k.Column, top.Content[i+1]})
	}
	return keys
}

// explain says what the decoder's error e means for an operator.
func explain(keys []position, e *yaml.LoadError) string {
	var at *position // the last key at or before the error
	for i, k := range keys {
		if k.line < e.Mark.Line || k.line == e.Mark.Line && k.column <= e.Mark.Column {
			at = &keys[i]
		}
	}
	if at == nil {
		return e.Message + "; the file is a list of KEY: VALUE lines, see deploy/migrated.yaml"
	}
	field, known := fields()[at.name]
	switch {
	case !known:
		return fmt.Sprintf("unknown key %q%s", at.name, suggestion(at.name))
	case at.line == e.Mark.Line && at.column == e.Mark.Column:
		return e.Message // "mapping key … already defined at line …"
	case at.value.Kind == yaml.SequenceNode && field.Type.Kind() == reflect.Slice:
		return fmt.Sprintf("%s: an entry of the list is not a text", at.name)
	default:
		return fmt.Sprintf("%s: %s is not %s", at.name, excerpt(at.value), kinds[field.Type.String()])
	}
}

// kinds says in words what a key's Go type accepts.
var kinds = map[string]string{
	"string":   "a text",
	"int":      "a whole number (written without quotes)",
	"bool":     "true or false (written without quotes)",
	"[]string": "a list of texts, as in [first, second]",
}

// excerpt shows a value as it stands in the file, lists and mappings by kind.
func excerpt(n *yaml.Node) string {
	switch n.Kind {
	case yaml.SequenceNode:
		return "a list"
	case yaml.MappingNode:
		return "a mapping"
	default:
		return fmt.Sprintf("%q", n.Value)
	}
}

// fields returns Config's fields by their key.
func fields() map[string]reflect.StructField {
	byKey := make(map[string]reflect.StructField)
	for f := range reflect.TypeFor[Config]().Fields() {
		byKey[f.Tag.Get("yaml")] = f
	}
	return byKey
}

// Keys returns the keys that a file may have, sorted.
func Keys() []string {
	var keys []string
	for key := range fields() {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// suggestion names the nearest valid key, or all where none is near.
func suggestion(unknown string) string {
	keys := Keys()
	nearest := slices.MinFunc(keys, func(a, b string) int {
		return distance(unknown, a) - distance(unknown, b)
	})
	if distance(unknown, nearest) <= max(2, len(nearest)/3) {
		return fmt.Sprintf("; did you mean %q?", nearest)
	}
	return "; valid keys are " + strings.Join(keys, ", ")
}

// distance is the Levenshtein distance of two keys, which ignores case and
// counts "-" as "_", the two ways in which flags and keys get confused.
func distance(a, b string) int {
	normal := func(s string) string { return strings.ReplaceAll(strings.ToLower(s), "-", "_") }
	a, b = normal(a), normal(b)
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0] // the row above, one to the left
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

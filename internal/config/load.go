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
	Line int    // from 1 on; 0: the file as a whole
	Text string // what is wrong, and what would be right
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

// keyPosition is the position of a key in the file.
type keyPosition struct {
	name         string
	line, column int
	value        *yaml.Node
}

// keyPositions lists the top-level keys of the file in their order. The
// decoder's errors have positions but no key names.
func keyPositions(document *yaml.Node) []keyPosition {
	top := document
	if top.Kind == yaml.DocumentNode && len(top.Content) > 0 {
		top = top.Content[0]
	}
	if top.Kind != yaml.MappingNode {
		return nil
	}
	var keys []keyPosition
	for i := 0; i+1 < len(top.Content); i += 2 {
		k := top.Content[i]
		keys = append(keys, keyPosition{k.Value, k.Line, k.Column, top.Content[i+1]})
	}
	return keys
}

// explain returns a text for the operator about the decoder's error e.
func explain(keys []keyPosition, e *yaml.LoadError) string {
	var key *keyPosition // the last key at or before the error
	for i, k := range keys {
		if k.line < e.Mark.Line || k.line == e.Mark.Line && k.column <= e.Mark.Column {
			key = &keys[i]
		}
	}
	if key == nil {
		return e.Message + "; the file is a list of KEY: VALUE lines, see deploy/migrated.yaml"
	}
	field, known := fields()[key.name]
	switch {
	case !known:
		return fmt.Sprintf("unknown key %q%s", key.name, suggestion(key.name))
	case key.line == e.Mark.Line && key.column == e.Mark.Column:
		return e.Message // "mapping key … already defined at line …"
	case key.value.Kind == yaml.SequenceNode && field.Type.Kind() == reflect.Slice:
		return fmt.Sprintf("%s: an entry of the list is not a text", key.name)
	default:
		return fmt.Sprintf("%s: %s is not %s", key.name, excerpt(key.value), typeNames[field.Type.String()])
	}
}

// typeNames describe the values of a key, by its Go type.
var typeNames = map[string]string{
	"string":   "a text",
	"int":      "a whole number (written without quotes)",
	"bool":     "true or false (written without quotes)",
	"[]string": "a list of texts, as in [first, second]",
}

// excerpt returns a value as it is in the file, or "a list" or "a mapping".
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

// suggestion names the valid key that is most similar, or all keys if none is similar.
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

// distance returns the Levenshtein distance of two keys. It ignores case, and
// treats "-" as "_", because flags and keys are easily confused.
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

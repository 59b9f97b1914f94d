// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

//go:generate go test -trimpath -vet=off -count=1 -run ^TestReference$ . -update

var update = flag.Bool("update", false, "write docs/configuration.md anew")

const examplePath = "../../deploy/migrated.yaml"

// TestReference compares docs/configuration.md with the shipped file and the code. The text of a key is the comment
// above it in the file, its type and default are those of Config, "reload" marks the keys of Reload, and the allowed
// values are in Validate's error for a wrong value.
func TestReference(t *testing.T) {
	const path = "../../docs/configuration.md"
	want, err := reference()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what %s and the code say: make generate", path, examplePath)
	}
}

const referenceHead = `<!-- Made by 'make generate' of deploy/migrated.yaml and internal/config. Do not edit. -->
# Configuration

The daemon reads ` + "`" + DefaultPath + "`" + `, or the file that ` + "`migrated serve --config PATH`" +
	` names: YAML, in which every key may be
left out. Each key is a flag of ` + "`migrated serve`" + `, too, with "-" for "_", which overrides the file ` +
	`([cli.md](cli.md#migrated-serve)).
Unknown keys are refused with their line, and values that cannot be used with what is right: ` +
	`the daemon does not start then, and
exits with 78. [deploy/migrated.yaml](../deploy/migrated.yaml) has all of this as a file.

` + "`systemctl reload migrated`" + ` (SIGHUP) takes over the keys that are marked *reload*: ` +
	`peers, operators and metrics_clients
decide about every call from then on, host_bandwidth holds at once, bandwidth for migrations that begin from then on.
All else waits for the next start, and the log names the keys that do. A file with a mistake changes nothing.

| key | type | default | |
|---|---|---|---|
`

// A comment is the text above a key of the file.
type comment struct{ key, text string }

// comments returns the comments of the shipped file, in their order.
func comments() (all []comment, err error) {
	data, err := os.ReadFile(examplePath)
	if err != nil {
		return nil, err
	}
	var text []string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		key, _, isKey := strings.Cut(line, ":")
		switch {
		case strings.HasPrefix(line, "#"):
			text = append(text, strings.TrimPrefix(strings.TrimPrefix(line, "#"), " "))
		case isKey && !strings.HasPrefix(line, " "):
			all = append(all, comment{key, strings.Join(text, "\n")})
			text = nil
		case line == "":
			text = nil // it was about the file as a whole
		}
	}
	return all, nil
}

func reference() (string, error) {
	all, err := comments()
	if err != nil {
		return "", err
	}
	// A key without a comment, such as tls_key, has the comment of the key before it.
	for i := range all {
		if i > 0 && all[i].text == "" {
			all[i].text = all[i-1].text
		}
	}
	types, defaults := fields(), reflect.ValueOf(Default())
	var table, sections strings.Builder
	for _, c := range all {
		field, known := types[c.key]
		if !known {
			return "", fmt.Errorf("%s has the key %s, which Config has not", examplePath, c.key)
		}
		value, err := asYAML(defaults.FieldByIndex(field.Index).Interface())
		if err != nil {
			return "", err
		}
		kind := map[string]string{
			"int": "number", "bool": "true or false", "string": "text", "[]string": "list of texts",
		}[field.Type.String()]
		if kind == "" {
			return "", fmt.Errorf("the type %s of %s has no name", field.Type, c.key)
		}
		reloads := ""
		if slices.Contains(reloaded, c.key) {
			reloads = "*reload*"
		}
		short := "`" + value + "`"
		if strings.Contains(value, "\n") {
			short = "[a list](#" + c.key + ")"
		}
		fmt.Fprintf(&table, "| [`%s`](#%s) | %s | %s | %s |\n", c.key, c.key, kind, short, reloads)

		if first := all[slices.IndexFunc(all, func(other comment) bool { return other.text == c.text })].key; first != c.key {
			fmt.Fprintf(&sections, "\n### %s\n\nAs [%s](#%s).\n", c.key, first, first)
		} else {
			fmt.Fprintf(&sections, "\n### %s\n\n%s\n", c.key, c.text)
		}
		if strings.Contains(value, "\n") {
			fmt.Fprintf(&sections, "\nDefault:\n\n```yaml\n%s:\n%s\n```\n", c.key, value)
		} else {
			fmt.Fprintf(&sections, "\nDefault: `%s`.", value)
		}
		if want := allowed(field); want != "" {
			fmt.Fprintf(&sections, " It must be %s.", want)
		}
		if reloads != "" {
			sections.WriteString(" `systemctl reload migrated` takes it over.")
		}
		sections.WriteString("\n")
	}
	return referenceHead + table.String() + sections.String(), nil
}

// asYAML returns a value as it is written in a file.
func asYAML(value any) (string, error) {
	switch v := value.(type) {
	case string:
		if v == "" {
			return `""`, nil
		}
		return v, nil
	case []string:
		if len(v) == 0 {
			return "[]", nil
		}
	}
	text, err := yaml.Marshal(value)
	return strings.TrimSuffix(string(text), "\n"), err
}

// allowed returns which values a key may have: the text of Validate's error for a value that is never valid.
func allowed(field reflect.StructField) string {
	wrong := Default()
	wrong.TLSCertificate, wrong.TLSKey, wrong.TLSCA = "/c", "/k", "/a"
	value := reflect.ValueOf(&wrong).Elem().FieldByIndex(field.Index)
	switch value.Kind() {
	case reflect.String:
		value.SetString("?\x00")
	case reflect.Int:
		value.SetInt(-1)
	case reflect.Slice:
		value.Set(reflect.ValueOf([]string{"- - -"}))
	}
	err := wrong.Validate()
	key := field.Tag.Get("yaml")
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) {
		return ""
	}
	for _, one := range joined.Unwrap() {
		var refused *ValueError
		if errors.As(one, &refused) && refused.Key == key {
			return refused.Want
		}
	}
	return ""
}

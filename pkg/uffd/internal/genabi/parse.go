// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"regexp"
	"strings"
)

// header holds the declarations of a kernel header, in the order of the file.
type header struct {
	macros  []*macro
	structs []*record
	byName  map[string]*macro
	records map[string]*record
}

// macro is one object-like #define.
type macro struct {
	name, body string
	value      uint64
	done       bool
}

// record is a struct or a union. It has no name if it is declared inside another record.
type record struct {
	name        string
	union       bool
	packed      bool
	fields      []*field
	size, align int
}

// field is one member. Exactly one of scalar and rec is set.
type field struct {
	name   string
	scalar string // __u8 … __s64
	rec    *record
	offset int
}

var (
	comment   = regexp.MustCompile(`(?s)/\*.*?\*/`)
	splice    = regexp.MustCompile(`\\\n`)
	defineRE  = regexp.MustCompile(`^#define\s+(\w+)(\(?)\s*(.*)$`)
	attribute = regexp.MustCompile(`__attribute__\s*\(\(packed\)\)|\b__packed\b`)
	token     = regexp.MustCompile(`\w+|[{};]`)
)

// section returns the lines from the first that contains from up to the next that contains until. An empty from means
// the beginning, an empty until the end.
func section(text, from, until string) (string, error) {
	start := strings.Index(text, from)
	if start < 0 {
		return "", fmt.Errorf("no line has %q", from)
	}
	start = strings.LastIndexByte(text[:start], '\n') + 1
	if until == "" {
		return text[start:], nil
	}
	rest := text[start:]
	skip := strings.IndexByte(rest, '\n') + 1
	end := strings.Index(rest[skip:], until)
	if end < 0 {
		return "", fmt.Errorf("no line after that with %q has %q", from, until)
	}
	return rest[:strings.LastIndexByte(rest[:skip+end], '\n')+1], nil
}

// clean removes comments and joins continued lines.
func clean(text string) string {
	return splice.ReplaceAllString(comment.ReplaceAllString(text, " "), " ")
}

// parse separates the preprocessor's lines from the declarations.
func parse(text string) (*header, error) {
	h := &header{byName: map[string]*macro{}, records: map[string]*record{}}
	var decls strings.Builder
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "#define"):
			m := defineRE.FindStringSubmatch(line)
			if m == nil {
				return nil, fmt.Errorf("cannot read %q", line)
			}
			// "NAME(" without a space takes arguments; "NAME (" is a value in parentheses.
			if m[2] == "(" && strings.HasPrefix(line[strings.Index(line, m[1])+len(m[1]):], "(") {
				return nil, fmt.Errorf("%s: macros with arguments are not understood", m[1])
			}
			body := strings.TrimSpace(m[2] + m[3])
			if body == "" { // the include guard
				continue
			}
			def := &macro{name: m[1], body: body}
			h.macros = append(h.macros, def)
			h.byName[def.name] = def
		case strings.HasPrefix(line, "#ifndef"), strings.HasPrefix(line, "#endif"), strings.HasPrefix(line, "#include"):
		case strings.HasPrefix(line, "#"):
			return nil, fmt.Errorf("directive not understood: %q", line)
		default:
			decls.WriteString(attribute.ReplaceAllString(line, "__packed") + "\n")
		}
	}
	p := &parser{tokens: token.FindAllString(decls.String(), -1), h: h}
	return h, p.file()
}

// parser walks the tokens of the declarations.
type parser struct {
	tokens []string
	h      *header
}

func (p *parser) next() string {
	if len(p.tokens) == 0 {
		return ""
	}
	t := p.tokens[0]
	p.tokens = p.tokens[1:]
	return t
}

func (p *parser) expect(want string) error {
	if got := p.next(); got != want {
		return fmt.Errorf("expected %q, found %q", want, got)
	}
	return nil
}

// file reads `struct name { … } [__packed];` until the end.
func (p *parser) file() error {
	for len(p.tokens) > 0 {
		if err := p.expect("struct"); err != nil {
			return err
		}
		name := p.next()
		r, err := p.body(false)
		if err != nil {
			return fmt.Errorf("struct %s: %w", name, err)
		}
		r.name = name
		if len(p.tokens) > 0 && p.tokens[0] == "__packed" {
			p.next()
			r.packed = true
		}
		if err := p.expect(";"); err != nil {
			return fmt.Errorf("struct %s: %w", name, err)
		}
		p.h.structs = append(p.h.structs, r)
		p.h.records[name] = r
	}
	return nil
}

// body reads `{ members }` of a struct or union.
func (p *parser) body(union bool) (*record, error) {
	r := &record{union: union}
	if err := p.expect("{"); err != nil {
		return nil, err
	}
	for {
		var f field
		switch t := p.next(); {
		case t == "}":
			return r, nil
		case t == "struct" || t == "union":
			if p.tokens[0] == "{" {
				rec, err := p.body(t == "union")
				if err != nil {
					return nil, err
				}
				f.rec = rec
				break
			}
			name := p.next()
			if f.rec = p.h.records[name]; f.rec == nil {
				return nil, fmt.Errorf("struct %s is used before it is declared", name)
			}
		case scalars[t].size != 0:
			f.scalar = t
		default:
			return nil, fmt.Errorf("type %q is not understood", t)
		}
		f.name = p.next()
		if err := p.expect(";"); err != nil {
			return nil, fmt.Errorf("member %s: %w", f.name, err)
		}
		r.fields = append(r.fields, &f)
	}
}

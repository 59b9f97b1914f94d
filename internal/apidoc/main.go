// SPDX-License-Identifier: Apache-2.0

// Command apidoc is a plugin of protoc that writes docs/api.md from the comments in the .proto files: the services that
// orchestrators call, their messages and enumerations. scripts/generate runs it.
package main

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/compiler/protogen"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/pluginpb"
)

// internalFiles have the protocol between daemons, which is not in the document.
var internalFiles = []string{"peer.proto", "pages.proto"}

func main() {
	protogen.Options{}.Run(func(plugin *protogen.Plugin) error {
		plugin.SupportedFeatures = uint64(pluginpb.CodeGeneratorResponse_FEATURE_PROTO3_OPTIONAL)
		out := plugin.NewGeneratedFile("api.md", "")
		r := &reference{print: func(format string, args ...any) { out.P(fmt.Sprintf(format, args...)) }}
		for _, f := range plugin.Files {
			if f.Generate && !isInternal(f.Desc.Path()) {
				r.files = append(r.files, f)
			}
		}
		r.write()
		return nil
	})
}

func isInternal(path string) bool {
	for _, name := range internalFiles {
		if strings.HasSuffix(path, "/"+name) {
			return true
		}
	}
	return false
}

// A reference is the document.
type reference struct {
	print func(format string, args ...any)
	files []*protogen.File
}

func (r *reference) write() {
	r.print("# The API\n")
	r.print("<!-- Made of the comments in proto/migrated/v1 by scripts/generate. -->\n")
	r.print("[orchestrators.md](orchestrators.md) shows how it is used, [pkg/client](../pkg/client) is a client for Go. " +
		"Names of the fields in JSON are these in lowerCamelCase.\n")
	for _, f := range r.files {
		for _, part := range []protoreflect.SourcePath{{syntaxField}, {packageField}} {
			if text := paragraphs(protogen.Comments(f.Desc.SourceLocations().ByPath(part).LeadingComments)); text != "" {
				r.print("%s\n", text)
			}
		}
	}
	for _, f := range r.files {
		for _, s := range f.Services {
			r.service(s)
		}
	}
	r.print("## Messages\n")
	for _, f := range r.files {
		for _, m := range f.Messages {
			r.message(m)
		}
	}
	r.print("## Enumerations\n")
	for _, f := range r.files {
		for _, e := range f.Enums {
			r.enum(e)
		}
	}
}

// Numbers of fields of a FileDescriptorProto.
const (
	packageField = 2
	syntaxField  = 12
)

func (r *reference) service(s *protogen.Service) {
	r.print("## %s\n", s.Desc.Name())
	r.print("%s\n", paragraphs(s.Comments.Leading))
	r.print("| method | takes | answers | |\n|---|---|---|---|")
	for _, m := range s.Methods {
		r.print("| `%s` | %s | %s | %s |", m.Desc.Name(), streamed(m.Desc.IsStreamingClient(), m.Input),
			streamed(m.Desc.IsStreamingServer(), m.Output), cell(m.Comments))
	}
	r.print("")
}

// streamed returns a link to the message that a method takes or answers, or to a stream of them.
func streamed(many bool, m *protogen.Message) string {
	if many {
		return "a stream of " + to(m.Desc)
	}
	return to(m.Desc)
}

func (r *reference) message(m *protogen.Message) {
	r.print("### %s\n", m.Desc.Name())
	if text := paragraphs(m.Comments.Leading); text != "" {
		r.print("%s\n", text)
	}
	if len(m.Fields) == 0 {
		r.print("It has no fields.\n")
		return
	}
	r.print("| field | type | |\n|---|---|---|")
	for _, f := range m.Fields {
		r.print("| `%s` | %s | %s |", f.Desc.Name(), kind(f.Desc), cell(f.Comments))
	}
	r.print("")
}

func (r *reference) enum(e *protogen.Enum) {
	r.print("### %s\n", e.Desc.Name())
	if text := paragraphs(e.Comments.Leading); text != "" {
		r.print("%s\n", text)
	}
	r.print("| value | number | |\n|---|---|---|")
	for _, v := range e.Values {
		r.print("| `%s` | %d | %s |", v.Desc.Name(), v.Desc.Number(), cell(v.Comments))
	}
	r.print("")
}

// kind returns the type of a field.
func kind(f protoreflect.FieldDescriptor) string {
	switch {
	case f.IsMap():
		return "map of " + single(f.MapKey()) + " to " + single(f.MapValue())
	case f.IsList():
		return "list of " + single(f)
	}
	return single(f)
}

func single(f protoreflect.FieldDescriptor) string {
	switch {
	case f.Message() != nil:
		return to(f.Message())
	case f.Enum() != nil:
		return to(f.Enum())
	}
	return f.Kind().String()
}

// to returns a link to a type in this document, or the name of a type of Protocol Buffers.
func to(d protoreflect.Descriptor) string {
	if !strings.HasPrefix(string(d.FullName()), "migrated.") {
		return string(d.Name())
	}
	return fmt.Sprintf("[%s](#%s)", d.Name(), strings.ToLower(string(d.Name())))
}

// paragraphs returns the text of a comment.
func paragraphs(c protogen.Comments) string {
	var all []string
	for text := range strings.SplitSeq(string(c), "\n\n") {
		if text = strings.Join(strings.Fields(text), " "); text != "" {
			all = append(all, plain.Replace(text))
		}
	}
	return strings.Join(all, "\n\n")
}

// cell returns a comment as the cell of a table.
func cell(c protogen.CommentSet) string {
	text := paragraphs(c.Leading + "\n\n" + c.Trailing)
	return strings.ReplaceAll(strings.ReplaceAll(text, "|", `\|`), "\n\n", "<br>")
}

// plain escapes characters that have a meaning in Markdown.
var plain = strings.NewReplacer("<", "&lt;", ">", "&gt;", "*", `\*`, "_", `\_`)

// SPDX-License-Identifier: Apache-2.0

// Package redact takes secrets out of texts that are logged or shown: command lines of QEMU, what QEMU writes about them,
// and what another host says.
package redact

import (
	"regexp"
	"slices"
	"strings"
)

// hidden stands where a secret was.
const hidden = "***"

var (
	// settings are "key=value" in a QEMU option, where a doubled comma is a comma. The data of -object secret is the
	// secret itself. password-secret= and the like are names of such objects.
	settings = regexp.MustCompile(`(?i)\b((?:[a-z]+[-.])*(?:password|passwd|passphrase|data)=)(?:[^,\n]|,,)+`)
	// members are the same in JSON, also where it is quoted once more.
	members = regexp.MustCompile(`(?i)((?:password|passwd|passphrase|data)\\*"\s*:\s*\\*")(?:[^"\\]|\\[^"]|\\+"[^,}\s])*`)
	// users are in a URL: user:password@host, and user%password@host of iSCSI.
	users = regexp.MustCompile(`(://[^/\s@:%]*)[:%][^/\s@]*@`)
)

// Text replaces secrets in a text: passwords, the data of QEMU's secret objects, and passwords in URLs.
func Text(text string) string {
	if strings.ContainsAny(text, "=:") {
		text = settings.ReplaceAllString(text, "${1}"+hidden)
		text = members.ReplaceAllString(text, "${1}"+hidden)
		text = users.ReplaceAllString(text, "${1}:"+hidden+"@")
	}
	return text
}

// Texts is Text of each text.
func Texts(texts []string) []string {
	redacted := slices.Clone(texts)
	for i, text := range redacted {
		redacted[i] = Text(text)
	}
	return redacted
}

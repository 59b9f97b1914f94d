// SPDX-License-Identifier: Apache-2.0

// Package redact replaces secrets in texts that are logged or shown: command lines of QEMU, QEMU's messages about them,
// and messages of other hosts.
package redact

import (
	"regexp"
	"slices"
	"strings"
)

// hidden replaces a secret.
const hidden = "***"

var (
	// settings matches "key=value" in a QEMU option, where a doubled comma is a comma. The data of -object secret is the
	// secret itself. password-secret= and the like have names of such objects, and do not match.
	settings = regexp.MustCompile(`(?i)\b((?:[a-z]+[-.])*(?:password|passwd|passphrase|data)=)(?:[^,\n]|,,)+`)
	// members matches the same in JSON, also in JSON that is quoted once more.
	members = regexp.MustCompile(`(?i)((?:password|passwd|passphrase|data)\\*"\s*:\s*\\*")(?:[^"\\]|\\[^"]|\\+"[^,}\s])*`)
	// users matches passwords in URLs: user:password@host, and user%password@host of iSCSI.
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

// Texts returns a copy of texts with Text applied to each.
func Texts(texts []string) []string {
	redacted := slices.Clone(texts)
	for i, text := range redacted {
		redacted[i] = Text(text)
	}
	return redacted
}

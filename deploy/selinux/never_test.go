// SPDX-License-Identifier: Apache-2.0

package selinux_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// mutations break every neverallow rule of the module once: a rule that somebody might add, and which one
// forbids it.
var mutations = []struct{ never, rule string }{
	{"N1", "(allow init_t migrated_uffd_t (anon_inode (read)))"},
	{"N1", "(allow svirt_t migrated_uffd_t (anon_inode (ioctl)))"},
	{"N1", "(allow other_t migrated_uffd_t (anon_inode (getattr)))"},
	{"N2", "(allow init_t migrated_uffd_t (anon_inode (create)))"},
	{"N2", "(allow other_t migrated_uffd_t (anon_inode (create)))"},
	{"N3", "(allow migrated_t migrated_uffd_t (anon_inode (map)))"},
	{"N4", "(allowx migrated_t migrated_uffd_t (ioctl anon_inode (0xaa06)))"},
	{"N4", "(allowx migrated_t migrated_uffd_t (ioctl anon_inode (range 0xaa00 0xaaff)))"},
	{"N5", "(allowx migrated_t migrated_probe_t (ioctl anon_inode (0xaa00)))"},
	{"N5", "(allow migrated_t migrated_probe_t (anon_inode (read)))"},
	{"N5", "(allow svirt_t migrated_probe_t (anon_inode (ioctl)))"},
	{"N6", "(allow svirt_t migrated_uffd_device_t (chr_file (open)))"},
	{"N6", "(allowx svirt_t migrated_uffd_device_t (ioctl chr_file (0xaa01)))"},
	{"N7", "(allow svirt_t self (capability (sys_ptrace)))"},
	{"N8", "(allow other_t svirt_t (process (ptrace)))"},
	{"N8", "(allow other_t migrated_t (process (ptrace)))"},
	{"N8", "(allow other_t migrated_t (fd (use)))"},
	{"N9", "(allow svirt_t migrated_t (process (transition)))"},
	{"N9", "(allow svirt_t svirt_t (process (ptrace)))"},
	{"N10", "(allow other_t migrated_t (process (transition)))"},
	{"N10", "(allow init_t migrated_t (process (dyntransition)))"},
	{"N10", "(allow migrated_t other_exec_t (file (entrypoint)))"},
	{"N11", "(allow svirt_t migrated_t (unix_stream_socket (connectto)))"},
	{"N11", "(allow svirt_t migrated_sock_t (sock_file (write)))"},
	{"N11", "(allow svirt_t migrated_port_t (tcp_socket (name_connect)))"},
	{"N11", "(allow svirt_t migrated_runtime_t (dir (add_name)))"},
	{"N11", "(allow svirt_t migrated_record_t (file (write)))"},
	{"N11", "(call migrated_client (svirt_t))"},
	{"N12", "(allow migrated_t other_exec_t (file (execute_no_trans)))"},
	{"N12", "(allow migrated_t self (process (execmem)))"},
	{"N12", "(allow migrated_t self (capability (sys_admin)))"},
	{"N12", "(allow migrated_t self (capability2 (mac_admin)))"},
	{"N13", "(allow init_t migrated_state_t (file (read)))"},
	{"N13", "(allow other_t migrated_state_t (file (write)))"},
	{"N13", "(allow svirt_t migrated_state_t (file (append)))"},
	{"N13", "(allow svirt_t migrated_state_t (file (map)))"},
	{"N13", "(allow migrated_t migrated_state_t (file (map)))"},
	{"N14", "(allow migrated_t svirt_t (file (write)))"},
	{"N14", "(allow migrated_t svirt_tmpfs_t (file (write)))"},
	{"N14", "(allow migrated_t svirt_image_t (file (map)))"},
	{"N14", "(allow migrated_t svirt_image_t (file (unlink)))"},
	{"N14", "(allowx migrated_t svirt_t (ioctl file (0x6611)))"},
	{"N15", "(allow migrated_t etc_t (file (setattr)))"},
	{"N15", "(allow migrated_t virt_image_t (file (write)))"},
}

// TestNever: the compiler refuses each of them, by the very rule that is there for it.
func TestNever(t *testing.T) {
	files := append(moduleFiles(t), basePolicy)
	rules := neverRules(t)
	broken := make(map[string]bool)
	for _, m := range mutations {
		t.Run(m.never+" "+m.rule, func(t *testing.T) {
			mutant := filepath.Join(t.TempDir(), "mutant.cil")
			if err := os.WriteFile(mutant, []byte(m.rule+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := compile(t, append(slices.Clone(files), mutant))
			var refused *rejection
			if !errors.As(err, &refused) {
				t.Fatalf("accepted (%v), want it refused by %s", err, m.never)
			}
			var by []string
			for _, match := range failedCheck.FindAllStringSubmatch(refused.text, -1) {
				by = append(by, rules[match[1]])
				broken[match[1]] = true
			}
			if !slices.Contains(by, m.never) {
				t.Errorf("refused by %q, want %s:\n%s", by, m.never, refused.text)
			}
		})
	}
	for place, never := range rules {
		if !broken[place] {
			t.Errorf("%s: no mutation breaks this rule of %s", place, never)
		}
	}
}

// TestNeverOnDebian: the check is on for the reference policy as well.
func TestNeverOnDebian(t *testing.T) {
	mutant := filepath.Join(t.TempDir(), "mutant.cil")
	if err := os.WriteFile(
		mutant, []byte("(allow unconfined_t migrated_uffd_t (anon_inode (read)))\n"), 0o600,
	); err != nil {
		t.Fatal(err)
	}
	_, err := compile(t, slices.Concat(referencePolicy(t), moduleFiles(t), []string{mutant}))
	var refused *rejection
	if !errors.As(err, &refused) || !failedCheck.MatchString(refused.text) {
		t.Errorf("secilc: %v, want a failed neverallow", err)
	}
}

// failedCheck finds FILE:LINE of the rule in secilc's "neverallow check failed at FILE:LINE".
var failedCheck = regexp.MustCompile(`neverallowx? check failed at (\S+:\d+)`)

// ruleComment is how a rule, or a group of them, is named: "; N4: ...".
var ruleComment = regexp.MustCompile(`^; ([A-Z]\d+): `)

// neverRules maps the place of each neverallow rule, FILE:LINE, to the name of its group.
func neverRules(t *testing.T) map[string]string {
	t.Helper()
	rules := make(map[string]string)
	for _, file := range moduleFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		group := ""
		for i, line := range strings.Split(string(text), "\n") {
			if match := ruleComment.FindStringSubmatch(line); match != nil {
				group = match[1]
			}
			if strings.HasPrefix(line, "(neverallow") {
				rules[fmt.Sprintf("%s:%s", file, strconv.Itoa(i+1))] = group
			}
		}
	}
	return rules
}

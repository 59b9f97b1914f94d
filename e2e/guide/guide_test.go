// SPDX-License-Identifier: Apache-2.0

package guide

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

const page = "# A page\n\nType `migrated list`:\n\n" +
	"<!-- run by TestIt on host-b -->\n```sh\nmigrated list \\\n    --json # all\n```\n\n" +
	"<!-- not run: no time -->\n```console\n$ make 'all of it'\nmade\nhost-a# echo \"$HOME\"\n```\n\n" +
	"    a: picture\n\n    of it\n\nThe end.\n"

func TestParse(t *testing.T) {
	p, err := parse(page)
	if err != nil {
		t.Fatal(err)
	}
	want := Page{
		Inline: []Inline{{3, "migrated list"}},
		Blocks: []Block{
			{Line: 7, Language: "sh", Text: "migrated list \\\n    --json # all", RunBy: "TestIt", On: "host-b"},
			{Line: 13, Language: "console", Text: "$ make 'all of it'\nmade\nhost-a# echo \"$HOME\"", NotRun: "no time"},
			{Line: 18, Text: "a: picture\n\nof it"},
		},
	}
	if diff := cmp.Diff(want, p); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(
		[]Command{{"", "make 'all of it'"}, {"host-a", `echo "$HOME"`}}, p.Blocks[1].Commands(),
	); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
	if blocks, err := p.RunBy("TestIt"); err != nil || len(blocks) != 1 || blocks[0].Commands()[0].Host != "host-b" {
		t.Errorf("%v, %v", blocks, err)
	}
	if _, err := p.RunBy("TestOther"); err == nil {
		t.Error("a test that no block names has blocks")
	}
	for _, wrong := range []string{"```sh\nls\n", "<!-- ran by TestIt -->\n```sh\nls\n```\n"} {
		if _, err := parse(wrong); err == nil {
			t.Errorf("%q is a page", wrong)
		}
	}
}

func TestCalls(t *testing.T) {
	calls, err := Calls("migrated idle && migrated check \\\n  --vm \"libvirt:$vm\" 'a b' | jq . # migrated not\n"+
		"for i in 1; do x migrated; migrated list; done", "migrated")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(
		[][]string{{"idle"}, {"check", "--vm", "libvirt:$vm", "a b"}, {"list"}}, calls,
		cmp.Transformer("empty", func(s []string) []string { return append([]string{}, s...) }),
	); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, err := Calls("if then", "migrated"); err == nil {
		t.Error("a script that no shell reads has calls")
	}
}

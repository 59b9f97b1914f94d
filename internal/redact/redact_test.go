// SPDX-License-Identifier: Apache-2.0

package redact

import "testing"

func TestText(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"secret,id=s0,data=hunter2", "secret,id=s0,data=***"},
		{"secret,data=hun,,ter 2,id=s0", "secret,data=***,id=s0"},
		{`{"qom-type":"secret","id":"s0","data":"hun\"ter,2"}`, `{"qom-type":"secret","id":"s0","data":"***"}`},
		{`-object "{\"data\":\"hunter2\",\"id\":\"s0\"}"`, `-object "{\"data\":\"***\",\"id\":\"s0\"}"`},
		{"driver=iscsi,portal=p,password=hunter2,lun=0", "driver=iscsi,portal=p,password=***,lun=0"},
		{"file.password=hunter2", "file.password=***"},
		{"iscsi://user%hunter2@host/iqn/0", "iscsi://user:***@host/iqn/0"},
		{"file=https://user:hunter2@host/disk.qcow2,if=none", "file=https://user:***@host/disk.qcow2,if=none"},
		{"QEMU: -object secret,id=a,data=hunter2", "QEMU: -object secret,id=a,data=***"},
		{"iscsi,password-secret=s0,portal=p", "iscsi,password-secret=s0,portal=p"},
		{"https://host:8080/disk@2", "https://host:8080/disk@2"},
		{"drive,file=/a/b,format=qcow2", "drive,file=/a/b,format=qcow2"},
	} {
		if got := Text(test.text); got != test.want {
			t.Errorf("Text(%s) is %s, want %s", test.text, got, test.want)
		}
	}
}

// FuzzText: Text changes nothing in a text that it has redacted.
func FuzzText(f *testing.F) {
	f.Add("secret,data=a,,b,id=c")
	f.Add(`{"data":"a\\\"b"}`)
	f.Add("://a:b@c")
	f.Fuzz(func(t *testing.T, text string) {
		if once := Text(text); Text(once) != once {
			t.Errorf("%q becomes %q, then %q", text, once, Text(once))
		}
	})
}

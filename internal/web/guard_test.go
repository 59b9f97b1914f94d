// SPDX-License-Identifier: Apache-2.0

package web

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// echo answers with the body of the request.
var echo = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(err)
	}
	_, _ = w.Write(body)
})

func newGuard(names ...string) *guard {
	return &guard{
		names:   func() (*x509.Certificate, error) { return &x509.Certificate{DNSNames: names}, nil },
		foreign: func(*http.Request, error) {},
		streams: newPlaces(mostStreams, mostStreamsOfOne),
	}
}

// ask sends a request with these headers, "Name: value", Host among them.
func ask(t *testing.T, h http.Handler, method, path string, body io.Reader, headers ...string) *http.Response {
	t.Helper()
	r := httptest.NewRequest(method, "http://localhost:7603"+path, body)
	for _, header := range headers {
		name, value, _ := strings.Cut(header, ": ")
		if name == "Host" {
			r.Host = value
			continue
		}
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

// TestHosts: requests for a name that an attacker could have, as in DNS rebinding, are refused.
func TestHosts(t *testing.T) {
	h := newGuard("host-a.example", "*.vms.example").protect(echo)
	for host, good := range map[string]bool{
		"localhost": true, "localhost:7603": true, "LOCALHOST:7603": true, "a.localhost:1": true,
		"localhost.:7603": true,
		"127.0.0.1:7603":  true, "192.0.2.7": true, "[::1]:7603": true, "[2001:db8::1]": true,
		"host-a.example:7603": true, "Host-A.example": true, "x.vms.example:7603": true,
		"evil.example": false, "evil.example:7603": false, "": false, "localhost.evil.example": false,
		"127.0.0.1.evil.example:7603": false,
		"evil.example:127.0.0.1":      false, "notlocalhost": false, "y.x.vms.example": false,
	} {
		answer := ask(t, h, http.MethodGet, "/v1/version", nil, "Host: "+host)
		if (answer.StatusCode == http.StatusOK) != good {
			t.Errorf("host %q has status %d", host, answer.StatusCode)
		}
	}
	if err := (&guard{}).checkHost("host-a.example"); err == nil {
		t.Error("without a certificate there is a name")
	}
	broken := &guard{names: func() (*x509.Certificate, error) { return nil, errors.New("gone") }}
	if broken.checkHost("host-a.example") == nil || broken.checkHost("127.0.0.1") != nil {
		t.Error("a certificate that cannot be read has names, or takes the address away")
	}
}

// TestForeignRequests: requests that another site's page can make a browser send are refused, those of the page and of
// curl are not.
func TestForeignRequests(t *testing.T) {
	g, refused := newGuard(), 0
	g.foreign = func(*http.Request, error) { refused++ }
	h := g.protect(echo)
	const json, form = "Content-Type: application/json", "Content-Type: application/x-www-form-urlencoded"
	const navigates, document = "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"
	for _, c := range []struct {
		name, method string
		headers      []string
		want         int
	}{
		{"curl", "POST", []string{json}, 200},
		{"JSON in a character set", "POST", []string{json + "; charset=utf-8"}, 200},
		{"the page", "POST", []string{json, "Origin: http://localhost:7603", "Sec-Fetch-Site: same-origin"}, 200},
		{"the page of an older browser", "POST", []string{json, "Origin: http://localhost:7603"}, 200},
		{"no content type", "POST", nil, 415},
		{"a form", "POST", []string{form}, 415},
		{"text", "POST", []string{"Content-Type: text/plain"}, 415},
		{"something like JSON", "POST", []string{"Content-Type: application/json-patch"}, 415},
		{"no content type, to delete", "DELETE", nil, 415},
		{"no content type, to put", "PUT", nil, 415},
		{"a method of nobody's", "BREW", nil, 415},
		{"another site", "POST", []string{json, "Sec-Fetch-Site: cross-site"}, 403},
		{"another port of this host", "POST", []string{json, "Sec-Fetch-Site: same-site"}, 403},
		{"another site's origin", "POST", []string{json, "Origin: https://evil.example"}, 403},
		{"another port's origin", "POST", []string{json, "Origin: http://localhost:7604"}, 403},
		{"a file, or a frame in a sandbox", "POST", []string{json, "Origin: null"}, 403},
		{"another site asks whether it may", "OPTIONS",
			[]string{"Origin: https://evil.example", "Access-Control-Request-Method: POST"}, 415},
		{"curl reads", "GET", nil, 200},
		{"the page reads", "GET", []string{"Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors"}, 200},
		{"the address bar", "GET", []string{"Sec-Fetch-Site: none", navigates, document}, 200},
		{"a link", "GET", []string{"Sec-Fetch-Site: cross-site", navigates, document}, 200},
		{"a frame", "GET", []string{"Sec-Fetch-Site: cross-site", navigates, "Sec-Fetch-Dest: iframe"}, 403},
		{"another site reads", "GET", []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"}, 403},
		{"another port reads", "GET", []string{"Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: no-cors"}, 403},
	} {
		refused = 0
		answer := ask(t, h, c.method, "/v1/migrations", strings.NewReader("{}"), c.headers...)
		if told := refused > 0; told != (c.want == 403) {
			t.Errorf("%s: that it is refused is told: %v", c.name, told)
		}
		if answer.StatusCode != c.want {
			t.Errorf("%s: status %d, want %d", c.name, answer.StatusCode, c.want)
		}
		for name := range answer.Header {
			if strings.HasPrefix(name, "Access-Control-") {
				t.Errorf("%s: another site gets %s", c.name, name)
			}
		}
		for name, has := range map[string]string{
			"Content-Security-Policy": "frame-ancestors 'none'", "X-Frame-Options": "DENY",
			"X-Content-Type-Options":       "nosniff",
			"Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store",
		} {
			if !strings.Contains(answer.Header.Get(name), has) {
				t.Errorf("%s: %s is %q", c.name, name, answer.Header.Get(name))
			}
		}
		if strings.Contains(answer.Header.Get("Content-Security-Policy"), "unsafe") {
			t.Errorf("%s: the policy allows what is in the page's text", c.name)
		}
	}
}

// TestBodies: a body that is too large is refused, whether it says so or not.
func TestBodies(t *testing.T) {
	h := newGuard().protect(echo)
	for size, want := range map[int]int{0: 200, 10: 200, bodyBytes: 200, bodyBytes + 1: 413, 4 * bodyBytes: 413} {
		body := strings.Repeat("x", size)
		for what, reader := range map[string]io.Reader{
			"of a known length":    strings.NewReader(body),
			"of an unknown length": io.MultiReader(strings.NewReader(body)),
		} {
			answer := ask(t, h, http.MethodPost, "/v1/check", reader, "Content-Type: application/json")
			got, err := io.ReadAll(answer.Body)
			if err != nil {
				t.Fatal(err)
			}
			if answer.StatusCode != want || want == 200 && string(got) != body {
				t.Errorf("a body %s, %d: status %d, %d bytes come back", what, size, answer.StatusCode, len(got))
			}
		}
	}
}

// TestStreamsAtOnce: one caller, and all together, have a limited number of streams. Other calls are not limited.
// Callers at the Unix socket have no address, and no limit of their own.
func TestStreamsAtOnce(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	h := newGuard().protect(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if streams(r) {
			entered <- struct{}{}
			<-leave
		}
	}))
	get := func(from, path string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, "http://localhost"+path, nil)
		r.RemoteAddr = from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	const path = "/v1/migrations/m:watch"
	done := make(chan int)
	open := func(from string) {
		go func() { done <- get(from, path).Code }()
		<-entered
	}
	opened := 0
	for caller := range mostStreams / mostStreamsOfOne {
		from := fmt.Sprintf("192.0.2.%d:1", caller)
		for range mostStreamsOfOne {
			if caller == 0 {
				open(from)
			} else {
				open("@") // a Unix socket's
			}
			opened++
		}
		if caller == 0 {
			w := get(from, path)
			if w.Code != http.StatusTooManyRequests || !strings.Contains(w.Body.String(), `"code":8`) {
				t.Errorf("one stream too many of a caller: %d %s", w.Code, w.Body)
			}
		}
	}
	if w := get("192.0.2.99:1", path); w.Code != http.StatusTooManyRequests {
		t.Errorf("one stream too many: status %d", w.Code)
	}
	if w := get("192.0.2.0:1", "/v1/migrations"); w.Code != http.StatusOK {
		t.Errorf("a call beside all streams: status %d", w.Code)
	}
	close(leave)
	for range opened {
		if code := <-done; code != http.StatusOK {
			t.Errorf("a stream that has a place: status %d", code)
		}
	}
	go func() { done <- get("192.0.2.99:1", path).Code }()
	<-entered
	if code := <-done; code != http.StatusOK {
		t.Errorf("a stream when the others are over: status %d", code)
	}
}

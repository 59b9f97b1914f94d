// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/pkg/testenv"
)

// forward lets a browser reach a Unix socket of a host, as ssh -L does, and returns the URL of the page there.
func forward(t *testing.T, h *lab.Host, socket string) string {
	t.Helper()
	awaitFile(t, h.Path(socket))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var carrying sync.WaitGroup
	t.Cleanup(func() {
		if err := listener.Close(); err != nil {
			t.Error(err)
		}
		carrying.Wait()
	})
	carry := func(from net.Conn) {
		defer from.Close()
		to, err := net.Dial("unix", h.Path(socket))
		if err != nil {
			return // the daemon has ended
		}
		defer to.Close()
		stop := context.AfterFunc(t.Context(), func() { _ = from.Close(); _ = to.Close() })
		defer stop()
		go func() {
			_, _ = io.Copy(to, from)
			_ = to.Close()
		}()
		_, _ = io.Copy(from, to)
	}
	carrying.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			carrying.Go(func() { carry(c) })
		}
	})
	return "http://" + strings.Replace(listener.Addr().String(), "127.0.0.1", "localhost", 1) + "/"
}

// browserTime bounds the life of a browser, which is that of its test.
const browserTime = 15 * time.Minute

// browser is a headless browser.
type browser struct {
	ctx context.Context //nolint:containedctx // as chromedp has it
	axe string
}

func newBrowser(t *testing.T) *browser {
	t.Helper()
	program, err := exec.LookPath("chromium-headless-shell")
	if err != nil {
		testenv.CannotRun(t, "no browser: %v; scripts/setup test installs it", err)
	}
	path, err := exec.CommandContext(testContext(t), "../scripts/axe").Output()
	if err != nil {
		testenv.CannotRun(t, "no axe-core: %v", err)
	}
	axe, err := os.ReadFile(strings.TrimSpace(string(path)))
	if err != nil {
		t.Fatal(err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(program), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.WSURLReadTimeout(patience))
	whole, cancel := context.WithTimeout(t.Context(), browserTime)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewExecAllocator(whole, options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("start the browser: %v", err)
	}
	return &browser{ctx, string(axe)}
}

// tab is a tab of the browser that shows a page.
type tab struct {
	ctx     context.Context //nolint:containedctx // as chromedp has it
	axe     string
	mayLose atomic.Bool // whether the page may lose its connection to the daemon
}

// open opens a page. The test fails if a script of the page throws, or if its policy blocks something.
func (b *browser) open(t *testing.T, url string) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(b.ctx)
	t.Cleanup(cancel)
	p := &tab{ctx: ctx, axe: b.axe}
	if err := chromedp.Listen(ctx, func(ev any) {
		switch ev := ev.(type) {
		case *runtime.EventExceptionThrown:
			t.Errorf("the page's script: %+v", ev.ExceptionDetails)
		case *cdplog.EventEntryAdded:
			if !p.mayLose.Load() || !strings.Contains(ev.Entry.Text, "net::ERR_") {
				t.Errorf("the browser complains: %s %s", ev.Entry.Text, ev.Entry.URL)
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	devtools(t, p, cdplog.Enable, cdp.Empty{})
	p.do(t, chromedp.EmulateViewport(1440, 900), chromedp.Navigate(url))
	return p
}

func (p *tab) do(t *testing.T, steps ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(p.ctx, steps...); err != nil {
		t.Fatal(err)
	}
}

// inPage runs JavaScript in the page, even if the page's policy would block it.
func inPage[T any](t *testing.T, p *tab, expression string) T {
	t.Helper()
	v, err := chromedp.Run(p.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func devtools[P, R any](t *testing.T, p *tab, c cdp.Command[P, R], params P) {
	t.Helper()
	if _, err := chromedp.Call(p.ctx, c, params); err != nil {
		t.Fatal(err)
	}
}

// until waits for a condition of the page.
func (p *tab) until(t *testing.T, condition string) {
	t.Helper()
	eventually(t, func() error {
		if !inPage[bool](t, p, "Boolean("+condition+")") {
			return fmt.Errorf("%s; the page:\n%s", condition, inPage[string](t, p, "document.body.innerText"))
		}
		return nil
	})
}

// sight is a width of the page, in pixels, and a colour scheme.
type sight struct {
	width  int64
	scheme string
}

var (
	desktop, desktopAtNight = sight{1440, "light"}, sight{1440, "dark"}
	phone, phoneAtNight     = sight{360, "light"}, sight{360, "dark"}
)

// look takes a screenshot of each sight, and checks the page's accessibility in each.
func (p *tab) look(t *testing.T, name string, sights ...sight) {
	t.Helper()
	inPage[chromedp.Void](t, p, "if (!window.axe) {"+p.axe+"}")
	for _, s := range sights {
		devtools(t, p, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: s.scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
		}})
		p.do(t, chromedp.EmulateViewport(s.width, 900))
		at := fmt.Sprintf("%s-%d-%s", name, s.width, s.scheme)
		if wide := inPage[int64](t, p, `document.documentElement.scrollWidth`); wide > s.width {
			t.Errorf("%s is %d pixels wide", at, wide)
		}
		picture, err := chromedp.Run(p.ctx, chromedp.FullScreenshot(100))
		if err != nil {
			t.Fatal(err)
		}
		save(t, filepath.Join("../build/page", at+".png"), picture)
		for _, found := range inPage[[]string](t, p, `axe.run(document, {resultTypes: ["violations"]}).then((found) =>
			found.violations.map((v) => v.id + ": " + v.help + ": " +
				v.nodes.map((n) => n.html.slice(0, 200) + " " + n.failureSummary).join("; ")))`) {
			t.Errorf("axe-core finds at %s: %s", at, found)
		}
	}
	p.do(t, chromedp.EmulateViewport(1440, 900))
}

func save(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/migrated-vm/migrated/e2e/lab"
	"github.com/migrated-vm/migrated/internal/bandwidth"
	"github.com/migrated-vm/migrated/internal/migration"
	"github.com/migrated-vm/migrated/internal/units"
	migratedv1 "github.com/migrated-vm/migrated/proto/migrated/v1"
)

// TestPage shows a migration in a browser at both of its hosts, as an operator would with ssh -L. The page shows what
// the API says, during the migration and at its end. A button cancels a migration. The page works with a keyboard, with
// a screen reader, on a phone and in dark mode. Screenshots are left in build/page.
func TestPage(t *testing.T) {
	t.Parallel()
	b := newBrowser(t)
	l := linkedHosts(t, lab.Link{Rate: 1e9, Delay: time.Millisecond})
	limit := func(rate int64) {
		for _, wire := range []*lab.Wire{l.AB, l.BA} {
			wire.Set(lab.Link{Rate: rate, Delay: time.Millisecond})
		}
	}
	a := startDaemon(t, l.A, "--http-listen", httpSocket)
	startDaemon(t, l.B, "--http-listen", httpSocket)
	s := newScene(t, l)
	client := control(t, l.A)

	here := b.open(t, forward(t, l.A, httpSocket))
	here.until(t, `document.querySelector(".empty")?.offsetParent`)
	here.look(t, "empty", phone)
	hide := func(hidden bool) {
		here.do(t, chromedp.Evaluate[chromedp.Void](fmt.Sprintf(
			`Object.defineProperty(document, "hidden", {value: %v, configurable: true});
			document.dispatchEvent(new Event("visibilitychange"))`, hidden)))
	}
	hide(true)
	here.until(t, `document.querySelector("#link").textContent === "asleep"`)
	hide(false)
	here.until(t, `document.querySelector("#link").textContent === "live"`)

	// Cancel a prepared migration. The keyboard alone opens the dialog, and closes it without cancelling.
	if _, err := client.Prepare(testContext(t), &migratedv1.PrepareRequest{Id: "not-now", Spec: s.spec()}); err != nil {
		t.Fatal(err)
	}
	here.until(t, `document.querySelector("#list a")`)
	here.do(t, chromedp.Focus(chromedp.CSS("#list a")), chromedp.KeyEvent("\r"))
	here.until(t, `document.querySelector("[data-action=cancel]")?.offsetParent`)
	await(t, client, "not-now", func(m *migratedv1.Migration) bool { return m.GetPrepared() })
	here.do(t, chromedp.Focus(chromedp.CSS("[data-action=cancel]")), chromedp.KeyEvent("\r"))
	here.until(t, `document.querySelector("dialog[open]")?.contains(document.activeElement)`)
	here.look(t, "cancel", desktop, phoneAtNight)
	here.do(t, chromedp.KeyEvent("\x1b"))
	here.until(t, `!document.querySelector("dialog")`)
	if m := get(t, l.A, "not-now"); m.GetState() == stateCancelled {
		t.Error("it was cancelled without a confirmation")
	}
	here.do(t, chromedp.Click(chromedp.CSS("[data-action=cancel]")),
		chromedp.Click(chromedp.CSS("dialog button[type=submit]")))
	here.until(t, `document.querySelector("[data-figure=state]").textContent === "cancelled"`)
	if m := get(t, l.A, "not-now"); m.GetState() != stateCancelled {
		t.Errorf("it is %v, and cancelled by the page", m.GetState())
	}

	// Show an active migration at both hosts. At this rate, and with only the pages that the VM waits for, it takes half
	// a minute at least.
	limit(1e6)
	spec := s.spec()
	spec.Bandwidth = bandwidth.Least // until the looks are done
	start(t, client, "m", spec)
	await(t, client, "m", func(m *migratedv1.Migration) bool { return m.GetState() == stateActive })
	there := b.open(t, forward(t, l.B, httpSocket)+"#/m/m/destination")
	here.do(t, chromedp.Evaluate[chromedp.Void](`location.hash = "#/m/m/source"`))
	for what, p := range map[string]*tab{"source": here, "destination": there} {
		p.until(t, `window.shown?.report?.migration.id === "m" && window.shown.incoming &&
			Number(window.shown.report.migration.progress.pagesPresent) > 0`)
		shown := p.compare(t, what+" while it goes on")
		if state := shown.report.GetMigration().GetState(); state != stateActive {
			t.Fatalf("%s: it is %v: too fast to be looked at", what, state)
		}
	}
	limit(3e5) // slower, because the screenshots take time
	there.look(t, "active-destination", desktop)
	here.look(t, "active-source", phoneAtNight)

	there.do(t, chromedp.Click(chromedp.CSS("[data-action=bandwidth]")),
		chromedp.Evaluate[chromedp.Void](`document.querySelector("dialog input").value = "much"`),
		chromedp.Click(chromedp.CSS("dialog button[type=submit]")))
	there.until(t, `document.querySelector("dialog .trouble").textContent.includes("“much” is no limit")`)
	there.do(t, chromedp.Evaluate[chromedp.Void](`document.querySelector("dialog input").value = "100M"`),
		chromedp.Click(chromedp.CSS("dialog button[type=submit]")))
	there.until(t, `document.querySelector("#said").textContent.includes("100.0 MiB/s")`)
	there.until(t, `document.querySelector("[data-more=rate]").textContent.includes("100.0 MiB/s")`)
	if is := get(t, l.B, "m").GetProgress().GetBandwidth(); is != 100<<20 {
		t.Errorf("the limit is %d, and 100 MiB/s by the page", is)
	}

	// Kill the source's daemon and start it again. Its page shows that the daemon is gone, and reconnects by itself.
	// The page of the destination shows that memory is missing.
	here.mayLose.Store(true)
	mustKill(t, a)
	here.until(t, `!document.querySelector("#lost").hidden`)
	there.until(t, `document.querySelector("[data-figure=paused]").textContent.endsWith(" s") &&
		document.querySelector("[data-action=abandon]").offsetParent`)
	there.look(t, "paused", desktopAtNight, phone)
	limit(1e9)
	startDaemon(t, l.A, "--http-listen", httpSocket)
	here.until(t, `document.querySelector("#lost").hidden && document.querySelector("#link").textContent === "live"`)
	client = control(t, l.A)
	awaitEnd(t, client, "m")
	for what, p := range map[string]*tab{"source": here, "destination": there} {
		p.until(t, `document.querySelector("[data-figure=state]").textContent === "completed"`)
		shown := p.compare(t, what+" in the end")
		host := map[string]*lab.Host{"source": l.A, "destination": l.B}[what]
		is := shown.report.GetMigration().GetProgress()
		if says := get(t, host, "m").GetProgress(); !proto.Equal(says, is) {
			t.Errorf("the %s's page is of %v, the API says %v", what, is, says)
		}
		if shown.counts["present"]+shown.counts["zero"] != is.GetPagesTotal() || shown.counts["faulted"] == 0 {
			t.Errorf("in the end the %s's map is %v", what, shown.counts)
		}
		p.look(t, "completed-"+what, desktop, desktopAtNight, phone, phoneAtNight)
		p.do(t, chromedp.EmulateViewport(phone.width, 900))
		if wide := inPage[int64](t, p, `document.querySelectorAll("details").forEach((e) => { e.open = true; });
			document.querySelectorAll(".facts td.number, .tile .value").forEach((e) => { e.textContent = "1888.8 ms"; });
			document.documentElement.scrollWidth`); wide > phone.width {
			t.Errorf("with long figures the %s's page is %d pixels wide on a phone", what, wide)
		}
	}
	here.do(t, chromedp.Evaluate[chromedp.Void](`location.hash = "#/"`))
	here.until(t, `document.querySelectorAll("#list tbody tr").length === 1`)
	here.look(t, "list", desktop, phone)
}

// shown is the data that a page was given and the text that it shows, at one moment.
type shown struct {
	report   *migratedv1.Report
	incoming *migratedv1.Incoming
	figures  map[string]string
	more     map[string]string
	counts   map[string]uint64 // of pages, below the map
}

// compare compares each figure on a page with the data that the page was given, formatted as the commands do.
func (p *tab) compare(t *testing.T, what string) *shown {
	t.Helper()
	text := inPage[string](t, p, `(() => {
		const texts = (name) => Object.fromEntries([...document.querySelectorAll("[data-" + name + "]")]
			.map((e) => [e.dataset[name], e.textContent]));
		return JSON.stringify({
			shown: window.shown, text: document.querySelector("#main").textContent,
			figures: texts("figure"), more: texts("more"), counts: texts("pages")});
	})()`)
	var raw struct {
		Shown                 struct{ Report, Incoming json.RawMessage }
		Text                  string
		Figures, More, Counts map[string]string
	}
	if err := json.Unmarshal([]byte(text), &raw); err != nil {
		t.Fatal(err)
	}
	s := &shown{
		report: &migratedv1.Report{}, incoming: &migratedv1.Incoming{},
		figures: raw.Figures, more: raw.More, counts: map[string]uint64{},
	}
	err := errors.Join(
		protojson.Unmarshal(raw.Shown.Report, s.report), protojson.Unmarshal(raw.Shown.Incoming, s.incoming),
	)
	if err != nil {
		t.Fatal(err)
	}
	for field, count := range raw.Counts {
		count, _, _ = strings.Cut(count, " ")
		var n uint64
		if _, err := fmt.Sscan(strings.ReplaceAll(count, ",", ""), &n); err != nil {
			t.Fatalf("%s: %d pages: %v", field, n, err)
		}
		s.counts[field] = n
	}
	m := s.report.GetMigration()
	pr := m.GetProgress()
	want := map[string]string{
		"memory": percentText(pr), "wire": units.Bytes(pr.GetBytesOnWire()),
		"downtime": units.Duration(pr.GetDowntime().AsDuration()), "faults": grouped(pr.GetFaults()),
		"waited": units.Duration(s.incoming.GetPages().GetLatencySum().AsDuration()),
		"state":  migration.StateName(m.GetState()),
	}
	if m.GetState() == stateActive {
		want["rate"] = units.Rate(pr.GetBytesPerSecond())
	}
	for name, is := range want {
		if s.figures[name] != is {
			t.Errorf("%s: %s is %q on the page, and %q", what, name, s.figures[name], is)
		}
	}
	for _, part := range []string{
		grouped(pr.GetPagesPresent()) + " of", grouped(pr.GetPagesZero()) + " zero", units.Bytes(pr.GetBytesTotal()),
	} {
		if !strings.Contains(s.more["memory"], part) {
			t.Errorf("%s: the page says of the memory %q, without %q", what, s.more["memory"], part)
		}
	}
	timed := uint64(0)
	for _, bucket := range s.incoming.GetPages().GetLatency() {
		timed += bucket.GetCount()
	}
	if words := grouped(timed) + " faults timed"; timed > 1 && !strings.Contains(raw.Text, words) {
		t.Errorf("%s: the page does not have %q", what, words)
	}
	var pages [6]uint64
	for _, b := range s.incoming.GetMemory().GetBlocks() {
		for i, list := range [][]uint32{
			b.GetMissing(), b.GetInFlight(), b.GetWaitedFor(), b.GetPresent(), b.GetZero(), b.GetFaulted(),
		} {
			for _, n := range list {
				pages[i] += uint64(n)
			}
		}
	}
	for i, field := range []string{"missing", "inFlight", "waitedFor", "present", "zero", "faulted"} {
		if s.counts[field] != pages[i] {
			t.Errorf("%s: %d pages are %s below the map, and %d on it", what, s.counts[field], field, pages[i])
		}
	}
	if all := pages[0] + pages[1] + pages[2] + pages[3] + pages[4]; all != pr.GetPagesTotal() {
		t.Errorf("%s: the map has %d pages of %d", what, all, pr.GetPagesTotal())
	}
	return s
}

func percentText(p *migratedv1.Progress) string {
	return fmt.Sprintf("%.1f%%", float64(int(float64(p.GetPagesPresent())/float64(p.GetPagesTotal())*1000))/10)
}

// grouped formats a number as the page does.
func grouped(n uint64) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// SPDX-License-Identifier: Apache-2.0
import { h, svg, text, table } from "./dom.js";
import { bytes, clock, duration, grouped, number, plural, rate, seconds, share, span, waits, word } from "./format.js";

// drawn draws into an element as wide as that is, and anew when its width changes.
function drawn(element, draw) {
  let last = 0;
  const again = () => {
    const width = Math.round(element.clientWidth);
    if (width > 0) element.replaceChildren(draw(width));
    last = width;
  };
  new ResizeObserver(() => { if (Math.round(element.clientWidth) !== last) again(); }).observe(element);
  return again;
}

// columnsOf joins buckets to powers of two of a microsecond, as the report does (internal/report).
export function columnsOf(latency) {
  const columns = [];
  for (const bucket of latency ?? []) {
    const longest = seconds(bucket.longest);
    let bound = columns.at(-1)?.longest ?? 1e-6;
    for (; bound < longest * (1 - 1e-9); bound *= 2) {
      if (columns.length > 0 && bound > columns.at(-1).longest) columns.push({ longest: bound, count: 0 });
    }
    if (columns.at(-1)?.longest !== bound) columns.push({ longest: bound, count: 0 });
    columns.at(-1).count += number(bucket.count);
  }
  return columns;
}

// histogram is of how long faults took.
export function histogram() {
  const figure = h("div");
  let columns = [], timed = 0;
  const again = drawn(figure, (width) => bars(columns, timed, width));
  const note = h("p", { class: "quiet" });
  const list = table("Faults by how long they took", ["at most", ["faults", "number"], ["share", "number"]]);
  return {
    element: h("div", {}, figure, note, h("details", {}, h("summary", {}, "As a table"), list.element)),
    update(pages, why) {
      columns = columnsOf(pages?.latency);
      timed = columns.reduce((n, column) => n + column.count, 0);
      list.rows(columns.map((c) => [span(c.longest), [grouped(c.count), "number"], [share(c.count, timed), "number"]]));
      text(note, timed === 0 ? (why ?? "No fault was timed yet.") :
        `${plural(timed, "fault")} timed, from a fault's message being read to its page being there. Threads waited for ${duration(pages.latencySum)} in all.`);
      figure.hidden = timed === 0;
      if (timed > 0) again();
    },
  };
}

function bars(columns, timed, width) {
  const most = Math.max(1, ...columns.map((c) => c.count));
  const height = 150, top = 16, step = width / Math.max(1, columns.length), every = Math.ceil(66 / step);
  const drawn = columns.flatMap((c, i) => {
    const tall = c.count === 0 ? 0 : Math.max(2, (c.count / most) * height);
    const bar = svg("rect", { class: "fill", x: i * step + 1, y: top + height - tall, width: Math.max(1, step - 2), height: tall, rx: 1.5 },
      svg("title", {}, `at most ${span(c.longest)}: ${grouped(c.count)}`));
    return i % every === 0 ? [bar, svg("text", { x: (i + 0.5) * step, y: top + height + 16, "text-anchor": "middle" }, span(c.longest).replace(/\.\d /, " "))] : [bar];
  });
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height + top + 20}`, role: "img", "aria-label": `Histogram of ${grouped(timed)} faults; the table below has its figures` },
    svg("line", { class: "ground", x1: 0, x2: width, y1: top + height + 0.5, y2: top + height + 0.5 }),
    svg("text", { x: 0, y: 11 }, plural(most, "fault")), drawn);
}

// curve draws points of 0 to 1, with what the axes stand for.
function curve(width, points, across, up, label) {
  const height = 110, top = 16;
  const at = points.map(([x, y]) => `${(x * width).toFixed(1)},${(top + (1 - y) * height).toFixed(1)}`).join(" ");
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height + top + 20}`, role: "img", "aria-label": label },
    svg("polygon", { class: "area", points: `${((points[0]?.[0] ?? 0) * width).toFixed(1)},${height + top} ${at} ${((points.at(-1)?.[0] ?? 0) * width).toFixed(1)},${height + top}` }),
    svg("polyline", { class: "curve", points: at }),
    svg("line", { class: "ground", x1: 0, x2: width, y1: height + top + 0.5, y2: height + top + 0.5 }),
    svg("text", { x: 0, y: 11 }, up), svg("text", { x: 0, y: height + top + 17 }, "the switch"),
    svg("text", { x: width, y: height + top + 17, "text-anchor": "end" }, across));
}

// ratesOf is how fast memory came between samples. One that was taken soon after another is left out: what came in a moment
// is no rate.
function ratesOf(samples, end) {
  const least = end / samples.length / 4;
  const rates = [];
  let before = { sinceSwitch: "0s", bytesOnWire: 0 };
  for (const s of samples) {
    const took = seconds(s.sinceSwitch) - seconds(before.sinceSwitch);
    if (took <= 0 || took < least) continue;
    rates.push([seconds(s.sinceSwitch), Math.max(0, number(s.bytesOnWire) - number(before.bytesOnWire)) / took]);
    before = s;
  }
  return rates;
}

// arrival is how the memory came: the share that is there, and the rate.
export function arrival() {
  const there = h("div"), fast = h("div");
  const note = h("p", { class: "quiet" });
  const both = h("div", {}, h("h4", {}, "There"), there, h("h4", {}, "Rate"), fast);
  let samples = [], total = 1, end = 1;
  const drawThere = drawn(there, (width) => curve(width, samples.map((s) => [seconds(s.sinceSwitch) / end, Math.min(1, number(s.pagesPresent) / total)]),
    span(end), "all pages", "The share of the pages that were there, from the switch on"));
  const drawFast = drawn(fast, (width) => {
    const rates = ratesOf(samples, end);
    const most = Math.max(1, ...rates.map(([, speed]) => speed));
    return curve(width, rates.map(([x, speed]) => [x / end, speed / most]), span(end), rate(most), `The rate at which memory came, at most ${rate(most)}`);
  });
  return {
    element: h("div", {}, note, both),
    update(progress, pages, why) {
      samples = pages?.samples ?? [];
      both.hidden = samples.length < 2;
      text(note, both.hidden ? (why ?? "Nothing has come yet.") :
        `${rate(pages.bestBytesPerSecond)} at the best, with ${number(progress.bandwidth) ? `a bandwidth limit of ${bytes(progress.bandwidth)}/s` : "no bandwidth limit"}.`);
      if (both.hidden) return;
      end = seconds(samples.at(-1).sinceSwitch) || 1;
      total = Math.max(1, number(progress.pagesTotal));
      drawThere();
      drawFast();
    },
  };
}

// strip is a bar of pieces, [share, class, name].
function strip(pieces) {
  return h("div", { class: "strip", "aria-hidden": "true" }, pieces.map(([part, className, name]) => {
    const piece = h("span", { class: className, title: name });
    piece.style.flexGrow = String(Math.max(part, 1e-6));
    return piece;
  }));
}

// joined makes one change of those from a lost connection to the next state: it is tried again and again.
function joined(changes) {
  const all = [];
  for (const c of changes) {
    const last = all.at(-1);
    if (waits(c.state) && last && waits(last.state)) last.tries += word(c.state) === "postcopy-recover" ? 1 : 0;
    else all.push({ ...c, tries: 0 });
  }
  return all;
}

// timeline is of states, as one host saw them.
export function timeline(caption) {
  const bar = h("div");
  const list = table(caption, ["state", ["after", "number"], ["lasted", "number"], ["at", "time"]]);
  const element = h("div", { class: "states" }, bar, list.element);
  return {
    element,
    update(line, now) {
      const changes = joined(line?.changes ?? []);
      element.hidden = changes.length === 0;
      if (changes.length === 0) return;
      const starts = changes.map((c) => seconds(c.sinceStart));
      const last = changes.at(-1);
      const over = ["completed", "failed", "cancelled", "rehearsed", "ended"].includes(word(last.state));
      const end = over ? starts.at(-1) : Math.max(starts.at(-1), starts.at(-1) + (Date.parse(now) - Date.parse(last.time)) / 1000);
      const lasted = starts.map((start, i) => (starts[i + 1] ?? end) - start);
      bar.replaceChildren(strip(changes.map((c, i) => [end > 0 ? lasted[i] / end : 1, `s-${word(c.state)}`, `${word(c.state)}: ${span(lasted[i])}`])));
      const shown = changes.map((c, i) => [
        word(c.state) + (c.reason && c.reason !== "REASON_UNSPECIFIED" ? ` (${word(c.reason)})` : "") + (c.tries > 0 ? `, tried again ${plural(c.tries, "time")}` : ""),
        [span(starts[i]), "number"], [i === changes.length - 1 && over ? "–" : span(lasted[i]), "number"], [clock(c.time), "time"]]);
      if (line.leftOut) shown.push([`${plural(line.leftOut, "change")} more, left out between`, "", "", ""]);
      list.rows(shown);
    },
  };
}

const steps = [
  ["save", "saveTime", "the source's QEMU wrote down the state of its devices"],
  ["transfer", "transferTime", "that state crossed, and the destination's QEMU loaded it"],
  ["commit", "commitTime", "the source heard of the stop, checked what was saved and committed"],
  ["crossing", "crossingTime", "the command to run the VM crossed the network"],
  ["continue", "continueTime", "the destination's QEMU took the disks and ran the VM"],
];

// downtime is its steps, one after the other.
export function downtime() {
  const bar = h("div");
  const note = h("p");
  const list = table("Steps of the downtime", ["step", ["took", "number"], "what took the time"]);
  return {
    element: h("div", {}, note, bar, list.element),
    update(all, took) {
      text(note, all ? `The VM stood still for ${duration(all)} at the switch.` : "The VM has not switched over.");
      const known = steps.filter(([, field]) => took?.[field]);
      // Without the first step it is not known where the others begin.
      const drawn = all && took?.saveTime ? known.map(([name, field], i) => [seconds(took[field]) / seconds(all), `s${i}`, name]) : [];
      bar.replaceChildren(...(drawn.length > 0 ? [strip(drawn)] : []));
      const name = (label, i) => (drawn.length > 0 ? h("span", {}, h("i", { class: `s${i}` }), label) : label);
      const shown = known.map(([label, field, what], i) => [name(label, i), [duration(took[field]), "number"], what]);
      if (took?.loadTime) shown.push(["loading", [duration(took.loadTime), "number"], "QEMU loaded the state; it may begin before all is saved"]);
      if (took?.stopTime) shown.push(["stop", [duration(took.stopTime), "number"], "QEMU stopped the VM, which ran for most of it"]);
      list.rows(shown);
      list.element.hidden = shown.length === 0;
    },
  };
}

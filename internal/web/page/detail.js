// SPDX-License-Identifier: Apache-2.0
//
// One migration: what the daemon's report says of it now, and what its destination does.
import { attribute, h, show, table, text } from "./dom.js";
import { bytes, clock, date, duration, grouped, isOver, limit, number, percent, plural, rate, seconds, share, span, tone, vmName, waits, word } from "./format.js";
import { memoryMap, totals } from "./map.js";
import { arrival, downtime, histogram, timeline } from "./charts.js";
import { buttons } from "./actions.js";

function part(title, ...children) {
  const id = title.toLowerCase().replaceAll(/[^a-z]+/g, "-");
  return h("section", { class: "part", "aria-labelledby": id }, h("h3", { id }, title), children);
}

// tiles are figures, each with a line below it.
function tiles(names) {
  const made = {};
  const element = h("dl", { class: "tiles" });
  for (const [name, label] of names) {
    made[name] = { label: h("dt", {}, label), value: h("dd", { class: "value", "data-figure": name }), more: h("dd", { class: "more", "data-more": name }) };
    element.append(h("div", { class: "tile" }, made[name].label, made[name].value, made[name].more));
  }
  return {
    element,
    set(name, value, more = "", label = undefined) {
      text(made[name].value, value);
      text(made[name].more, more);
      if (label) text(made[name].label, label);
    },
  };
}

// host is what one host says.
function host(title) {
  const list = h("dl");
  return {
    element: h("div", {}, h("h4", {}, title), list),
    update(facts) {
      const said = JSON.stringify(facts);
      if (list.dataset.said === said) return;
      list.dataset.said = said;
      list.replaceChildren(...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
    },
  };
}

// pausedSince is when the VM's memory stopped coming, in ms since 1970; undefined where it comes.
function pausedSince(line) {
  let since;
  for (const c of line?.changes ?? []) since = waits(c.state) ? (since ?? Date.parse(c.time)) : undefined;
  return since;
}

export function detail(main, say) {
  const name = h("h2"), chip = h("span", { class: "chip" }), way = h("p"), meaning = h("p", { class: "meaning", id: "meaning" });
  const back = h("p", { class: "back" }, h("a", { href: "#/" }, "‹ All migrations"));
  const message = h("p"), remedy = h("p"), where = h("p");
  const trouble = h("div", { class: "trouble", hidden: true }, message, where, remedy);
  const actions = buttons(say);
  const figures = tiles([["memory", "Memory there"], ["downtime", "Downtime"], ["rate", "Rate"], ["left", "Time left"], ["wire", "On the wire"], ["faults", "Page faults"], ["waited", "Waited for pages"], ["paused", "Without memory"]]);
  const map = memoryMap(), times = histogram(), came = arrival(), steps = downtime();
  const mine = timeline("States, as this host saw them"), theirs = timeline("States, as the destination saw them");
  const source = host("The source says"), destination = host("The destination says");
  const findings = h("ul", { class: "findings" });
  const found = part("What was slow, and why", findings);
  const causes = table("Faults by what was known of the page", ["page", ["faults", "number"], "meaning"]);
  const asked = table("What was asked for", ["setting", "value"]);
  const gone = h("p", { class: "empty", hidden: true });
  const whole = h("div", {},
    back, h("div", { class: "title" }, name, chip), way, meaning, trouble, actions.element, figures.element,
    h("div", { class: "parts" },
      Object.assign(part("The VM's memory", map.element), { className: "part whole" }),
      part("How the memory came", came.element), part("How long faults took", times.element, h("details", {}, h("summary", {}, "By cause"), causes.element)),
      part("The downtime, step by step", steps.element), part("States", mine.element, theirs.element),
      Object.assign(part("Both hosts", h("div", { class: "hosts" }, source.element, destination.element)), { className: "part whole" }),
      Object.assign(found, { className: "part whole" }),
      Object.assign(part("Settings", h("details", {}, h("summary", {}, "What was asked for"), asked.element)), { className: "part whole" })));
  main.append(gone, whole);
  let said;

  // lost says what a destination that was not heard of would have said.
  function lost(why) {
    return why ? `Unknown: ${why.message}${why.details?.[0]?.remedy ? ` What to do: ${why.details[0].remedy}` : ""}` : undefined;
  }

  return {
    // missing says that there is nothing to show.
    missing(why) {
      show(gone, true);
      show(whole, false);
      text(gone, why);
    },
    update({ report, words, incoming, incomingError }) {
      show(gone, false);
      show(whole, true);
      const m = report.migration, p = m.progress ?? {}, state = word(m.state), role = word(m.role), now = report.time;
      const pages = incoming?.pages ?? report.incoming, unknown = lost(incomingError);
      text(name, vmName(m));
      text(chip, state);
      attribute(chip, "data-tone", tone(state));
      attribute(chip, "data-figure", "state");
      text(way, `${role === "source" ? `From this host to ${m.spec?.destination || "–"}` : "To this host"} · migration ${m.id} · started ${date(m.createTime)}`);
      text(meaning, words);
      const change = waits(m.state) ? "waits" : state; // once a change, not once a second, nor at each attempt
      if (said !== undefined && said !== change) say(`${vmName(m)}: ${state}, ${words}`);
      said = change;
      show(trouble, Boolean(m.error?.message));
      text(message, m.error?.message ?? "");
      where.replaceChildren(...(m.error?.vmStatus ? [h("b", {}, "Where it is: "), m.error.vmStatus] : []));
      remedy.replaceChildren(...(m.error?.remedy ? [h("b", {}, "What to do: "), m.error.remedy] : []));
      actions.update(m);

      const some = number(p.pagesTotal) > 0;
      figures.set("memory", some ? percent(p) : "–", some ? `${grouped(p.pagesPresent)} of ${plural(p.pagesTotal, "page")}, ${grouped(p.pagesZero)} zero; ${bytes(p.bytesTotal)}` : "not prepared yet");
      figures.set("downtime", duration(p.downtime), p.downtime ? "from the stop to running at the destination" : "it has not switched over");
      figures.set("rate", some && !isOver(state) ? rate(p.bytesPerSecond) : "–", `sweep ${rate(p.sweepBytesPerSecond)}; ${limit(p.bandwidth)}`);
      figures.set("left", p.residency ? duration(p.residency) : duration(p.timeLeft), p.residency ? "from the switch to the last page" : p.timeLeft ? "estimated" : "no estimate", p.residency ? "All memory after" : "Time left");
      figures.set("wire", bytes(p.bytesOnWire), number(p.bytesDeviceState) ? `of pages; ${bytes(p.bytesDeviceState)} of device state` : "of pages");
      figures.set("faults", grouped(p.faults), number(p.faults) ? `p50 ${duration(p.faultP50)}, p99 ${duration(p.faultP99)}, max ${duration(p.faultMax)}` : "");
      figures.set("waited", pages?.latencySum ? duration(pages.latencySum) : "–", pages?.latencySum ? "all threads together" : unknown ? "the destination does not say" : "");
      const since = pausedSince(incoming?.timeline ?? report.timeline);
      const longest = pages?.longestPause && seconds(pages.longestPause) > 0 ? `${duration(pages.paused)} in all, ${duration(pages.longestPause)} at the longest` : "";
      figures.set("paused", since ? span(Math.max(0, (Date.parse(now) - since) / 1000)) : longest ? "no" : "never", since ? `since ${clock(since)}${longest ? `; ${longest}` : ""}` : longest);

      map.update(incoming?.memory, unknown ?? "There is no map yet: the memory is not prepared at the destination.");
      times.update(pages, unknown);
      came.update(p, pages, unknown);
      const c = pages?.causes ?? {};
      causes.rows([["missing", "nobody had asked for it"], ["swept", "the sweep had asked for it; it was asked for once more"], ["ahead", "it was prefetched because a thread's faults predicted it"],
        ["waiting", "another thread waited for it already"], ["zero", "it was known to be zero, and nothing crossed the network"], ["present", "it was there"]]
        .map(([kind, what]) => [kind, [grouped(c[kind]), "number"], what]));
      steps.update(p.downtime, report.downtimeSteps);
      mine.update(report.timeline, now);
      theirs.update(role === "source" ? (incoming?.timeline ?? report.destinationTimeline) : undefined, incoming?.time ?? now);
      hosts(report, m, role, state, incoming, unknown);

      show(found, Boolean(p.downtime) && (report.findings ?? []).length > 0);
      const list = JSON.stringify(report.findings ?? []);
      if (findings.dataset.said !== list) {
        findings.dataset.said = list;
        findings.replaceChildren(...(report.findings ?? []).map((f) => h("li", {}, f.text)));
      }
      asked.rows(Object.entries(m.spec ?? {}).filter(([, value]) => value !== "" && value !== false && value !== "0")
        .map(([key, value]) => [key.replaceAll(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`),
          typeof value === "object" ? Object.entries(value).map((pair) => pair.join("=")).join(", ") : String(value)]));
    },
  };

  function hosts(report, m, role, state, incoming, unknown) {
    const versions = (v) => [["Daemon", v?.daemon || "–"], ["QEMU", v?.qemu || "–"], ["Kernel", v?.kernel || "–"]];
    const own = [["State", state], ["The VM is at", word(m.location)], ["As of", clock(report.time)]];
    if (role === "source") {
      source.update([...own, ...versions(report.source)]);
      const t = totals(incoming?.memory);
      destination.update(incoming ? [["State", word(incoming.state)], ["The VM is at", word(incoming.location)],
        ["Pages there", `${grouped(incoming.progress?.pagesPresent)} (${share(number(incoming.progress?.pagesPresent), number(incoming.progress?.pagesTotal))})`],
        ["Waited for now", plural(t.waitedFor, "page")], ["As of", clock(incoming.time)], ...(incoming.error?.message ? [["Error", incoming.error.message]] : []), ...versions(report.destination)]
        : [["State", unknown ?? "not asked yet"], ...versions(report.destination)]);
      return;
    }
    source.update([["State", "not asked: a destination has its pages alone from the source. Look at the source's own page"], ...versions(report.source)]);
    destination.update([...own, ["Lanes opened again", plural(report.incoming?.laneReconnections, "time")], ...versions(report.destination)]);
  }
}

// SPDX-License-Identifier: Apache-2.0
//
// The migrations of this host, newest first.
import { attribute, h, show, text } from "./dom.js";
import { clock, date, duration, isOver, keyOf, number, percent, rate, tone, vmName, word } from "./format.js";

export function migrationList(nav) {
  const body = h("tbody");
  const head = (label, className) => h("th", { scope: "col", class: className }, label);
  const table = h("table", {},
    h("caption", { class: "hidden" }, "Migrations of this host, newest first"),
    h("thead", {}, h("tr", {}, head("VM"), head("State"), head("Memory", "number"), head("Rate", "number wide"), head("Downtime", "number wide"), head("Started", "wide"))), body);
  const empty = h("div", { class: "empty", hidden: true }, h("p", {}, "This daemon knows no migrations."),
    h("p", {}, "One begins with: ", h("code", {}, "migrated migrate --vm … --to HOST")));
  nav.append(h("h2", {}, "Migrations"), table, empty);
  const made = new Map();

  function rowOf(key) {
    const row = {
      link: h("a", { href: `#/m/${key}` }), way: h("span", { class: "way" }), chip: h("span", { class: "chip" }), percent: h("span"),
      fill: h("span"), rate: h("td", { class: "number wide" }), downtime: h("td", { class: "number wide" }), started: h("td", { class: "wide" }),
    };
    row.element = h("tr", {}, h("td", {}, row.link, row.way), h("td", {}, row.chip),
      h("td", { class: "number" }, row.percent, h("span", { class: "bar", "aria-hidden": "true" }, row.fill)), row.rate, row.downtime, row.started);
    return row;
  }

  return {
    update(migrations, chosen) {
      show(table, migrations.length > 0);
      show(empty, migrations.length === 0);
      const keys = new Set(migrations.map(keyOf));
      for (const [key, row] of made) {
        if (keys.has(key)) continue;
        row.element.remove();
        made.delete(key);
      }
      migrations.forEach((m, i) => {
        const key = keyOf(m), state = word(m.state), p = m.progress ?? {};
        if (!made.has(key)) made.set(key, rowOf(key));
        const row = made.get(key);
        if (body.rows[i] !== row.element) body.insertBefore(row.element, body.rows[i] ?? null);
        attribute(row.element, "aria-current", key === chosen ? "true" : undefined);
        text(row.link, vmName(m));
        text(row.way, word(m.role) === "source" ? `to ${m.spec?.destination || "–"}` : "to this host");
        text(row.chip, state);
        attribute(row.chip, "data-tone", tone(state));
        text(row.percent, number(p.pagesTotal) ? percent(p) : "–");
        row.fill.style.width = percent(p);
        text(row.rate, isOver(state) || !number(p.pagesTotal) ? "–" : rate(p.bytesPerSecond));
        text(row.downtime, duration(p.downtime));
        text(row.started, clock(m.createTime));
        row.started.title = date(m.createTime);
      });
    },
  };
}

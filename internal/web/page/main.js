// SPDX-License-Identifier: Apache-2.0
//
// The address says what is shown: #/ the list, #/m/ID/ROLE one migration. One stream of events brings both; when it is lost
// the page says so and keeps what it had.
import { attribute, text } from "./dom.js";
import { clock, keyOf, word } from "./format.js";
import { migrationList } from "./list.js";
import { detail } from "./detail.js";

const at = (id) => document.getElementById(id);
const said = at("said");
const say = (what) => { said.textContent = what; };
const list = migrationList(at("list"));
const known = new Map();
let stream, chosen, view, heard;

text(at("host"), location.hostname);

// showLink says whether what is shown is of now.
function showLink(state, words) {
  attribute(at("link"), "data-link", state);
  text(at("link"), state);
  at("lost").hidden = state !== "lost";
  text(at("lost"), state === "lost" ? `${words}. What is shown here is ${heard ? `of ${clock(heard)}` : "nothing yet"}; the page goes on by itself when the daemon answers.` : "");
}

function showList() {
  const newest = (a, b) => Date.parse(b.createTime) - Date.parse(a.createTime) || a.id.localeCompare(b.id) || (word(a.role) === "destination" ? 1 : -1);
  list.update([...known.values()].sort(newest), chosen);
}

function open() {
  stream?.close();
  const [, kind, id, role] = location.hash.split("/").map(decodeURIComponent);
  const to = kind === "m" && id ? `${id}/${role}` : undefined;
  if (to !== chosen || !view) {
    chosen = to;
    at("main").replaceChildren();
    view = undefined;
    if (chosen) {
      view = detail(at("main"), say);
      view.missing("Loading …");
    }
  }
  at("frame").classList.toggle("chosen", Boolean(chosen));
  at("skip").hidden = !chosen;
  document.title = "migrated";
  stream = new EventSource(chosen ? `events?${new URLSearchParams({ id, role: role ?? "" })}` : "events");
  stream.addEventListener("open", () => showLink("live", "live"));
  stream.addEventListener("error", () => showLink("lost", "The daemon does not answer"));
  stream.addEventListener("migrations", (event) => {
    const { all, migrations, gone } = JSON.parse(event.data);
    heard = Date.now();
    if (all) known.clear();
    for (const m of migrations) known.set(keyOf(m), m);
    for (const key of gone) known.delete(key);
    showList();
  });
  stream.addEventListener("one", (event) => {
    const one = JSON.parse(event.data);
    heard = Date.now();
    if (one.error) return view?.missing(one.error.message);
    document.title = `${word(one.report.migration.state)} · ${one.report.migration.vmName || one.report.migration.id} · migrated`;
    view?.update(one);
    window.shown = one; // for tests: all that is on the page is of this
  });
  stream.addEventListener("version", (event) => text(at("host"), `${location.hostname} · ${JSON.parse(event.data).version}`));
  stream.addEventListener("end", () => showLink("lost", "The daemon ends"));
  showList();
}

// A browser has six connections to a host, and tabs that nobody looks at would take them from those that somebody does.
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) return open();
  stream?.close();
  showLink("asleep");
});
at("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which migration it is
  at("main").focus();
});
addEventListener("hashchange", () => {
  open();
  if (chosen) at("main").focus();
});
at("frame").addEventListener("keydown", (event) => {
  // Up and down go through the list.
  if (!["ArrowDown", "ArrowUp"].includes(event.key) || !event.target.closest?.("#list a")) return;
  const links = [...at("list").querySelectorAll("a")];
  const next = links[links.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
  if (!next) return;
  event.preventDefault();
  next.focus();
});
open();

// SPDX-License-Identifier: Apache-2.0
//
// What can be done to a migration. The words are those of the commands' help (words.json, which a test compares with it);
// whether it may be done the daemon decides.
import { h, show, text } from "./dom.js";
import { isOver, limit, number, vmName, word } from "./format.js";

const words = await (await fetch("page/words.json")).json();
const broken = ["postcopy-paused", "postcopy-recover"];

// offered says which actions a migration has in its state.
export function offered(m) {
  const state = word(m.state), here = word(m.location);
  const left = [...broken, "handover", "failed"].includes(state) && here !== "source" && here !== "ended";
  if (word(m.role) === "source") {
    return [["setup", "device"].includes(state) && "cancel", m.prepared && !isOver(state) && "bandwidth", left && "fallback", left && "release"].filter(Boolean);
  }
  return [m.prepared && !isOver(state) && "bandwidth", broken.includes(state) && "recover", [...broken, "failed"].includes(state) && here !== "ended" && "abandon"].filter(Boolean);
}

// bytesOf reads a limit as the commands do; undefined where it is none.
function bytesOf(typed) {
  if (/^\s*none\s*$/i.test(typed)) return 0;
  const m = /^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)\s*$/i.exec(typed);
  if (!m) return undefined;
  return Math.round(Number(m[1]) * 1024 ** " KMGT".indexOf(m[2].toUpperCase() || " "));
}

// call makes a call of the API; it throws what is to be shown.
async function call(id, verb, body) {
  const answer = await fetch(`v1/migrations/${encodeURIComponent(id)}:${verb}`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  }).catch(() => { throw Object.assign(new Error("The daemon does not answer."), { remedy: "see whether it did what was asked when it answers again" }); });
  const told = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(told.message), { remedy: told.details?.[0]?.remedy });
  return told;
}

// ask opens the dialog of an action; say tells what came of it.
function ask(verb, m, say) {
  const of = words[verb];
  const input = of.ask && h("input", { type: "text", id: "typed", autocomplete: "off", spellcheck: "false", "aria-describedby": "asked" });
  const sure = of.sure && h("input", { type: "checkbox", required: true });
  const go = h("button", { type: "submit", class: of.danger || verb === "cancel" ? "danger strong" : "strong" }, of.do);
  const trouble = h("div", { class: "trouble", role: "alert" });
  const form = h("form", { method: "dialog" },
    h("h2", { id: "question" }, of.title), h("p", { class: "quiet" }, `${vmName(m)}, migration ${m.id}`), of.text.map((line) => h("p", {}, line)),
    input && h("label", { for: "typed" }, verb === "bandwidth" ? "Limit" : "Address (optional)"), input, input && h("p", { class: "quiet", id: "asked" }, of.ask),
    sure && h("label", { class: "sure" }, sure, h("span", {}, of.sure)), trouble,
    h("div", { class: "buttons" }, h("button", { type: "button", click: () => dialog.close() }, "Go back"), go));
  const dialog = h("dialog", { "aria-labelledby": "question", close: () => dialog.remove() }, form);
  if (input && verb === "bandwidth") input.value = number(m.progress?.bandwidth) ? `${number(m.progress.bandwidth) / 1024}K` : "none";
  if (sure) {
    go.disabled = true;
    sure.addEventListener("change", () => { go.disabled = !sure.checked; });
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    trouble.replaceChildren();
    const body = {};
    if (of.field) body[of.field] = sure.checked;
    if (verb === "recover") body.via = input.value.trim();
    if (verb === "bandwidth") {
      const bytes = bytesOf(input.value);
      if (bytes === undefined) return trouble.replaceChildren(h("p", {}, `“${input.value}” is no limit: ${of.ask}`));
      body.bandwidth = String(bytes);
    }
    go.disabled = true;
    try {
      const told = await call(m.id, verb, body);
      dialog.close();
      say(verb === "bandwidth" ? `The limit is now: ${limit(told.bandwidth)}` : `${of.do}: done`);
    } catch (error) {
      trouble.replaceChildren(h("p", {}, error.message), error.remedy ? h("p", {}, h("b", {}, "What to do: "), error.remedy) : "");
      go.disabled = false;
    }
  });
  document.body.append(dialog);
  dialog.showModal();
}

// buttons are those of the migration that is shown.
export function buttons(say) {
  const element = h("div", { class: "buttons" });
  let shown;
  const all = Object.fromEntries(Object.entries(words).map(([verb, of]) => [verb,
    h("button", { type: "button", class: of.danger ? "danger" : "", "data-action": verb, click: () => ask(verb, shown, say) }, of.button)]));
  element.append(...Object.values(all));
  return {
    element,
    update(m) {
      shown = m;
      const now = offered(m);
      for (const [verb, button] of Object.entries(all)) show(button, now.includes(verb));
      show(element, now.length > 0);
    },
  };
}

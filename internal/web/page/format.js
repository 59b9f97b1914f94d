// SPDX-License-Identifier: Apache-2.0
//
// Figures as the commands write them (internal/units). 64-bit numbers come as strings, durations as "1.5s".

export const number = (n) => Number(n ?? 0);
export const grouped = (n) => number(n).toLocaleString("en-US");

// seconds of a google.protobuf.Duration; undefined where there is none.
export const seconds = (d) => (d === undefined || d === null ? undefined : Number(d.slice(0, -1)));

export function bytes(n) {
  let value = number(n);
  if (value < 1024) return `${value} B`;
  const units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  for (value /= 1024; value >= 1023.95 && unit < units.length - 1; unit++) value /= 1024;
  return `${value.toFixed(1)} ${units[unit]}`;
}

export const rate = (perSecond) => `${(number(perSecond) / 1e6).toFixed(1)} MB/s`;
export const limit = (n) => (number(n) === 0 ? "no limit" : `${bytes(n)}/s`);

export function span(s) {
  if (s === undefined) return "–";
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  if (s < 1e-3) return `${Math.floor(s * 1e6 + 1e-6)} µs`;
  if (s < 1) return `${(s * 1e3).toFixed(1)} ms`;
  if (s < 60) return `${s.toFixed(1)} s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${two(s % 60)}s`;
  return `${Math.floor(s / 3600)}h${two((s / 60) % 60)}m`;
}
export const duration = (d) => span(seconds(d));

// percent of the pages that are there: 100.0% at the very last page only.
export function percent(p) {
  const total = number(p?.pagesTotal);
  return total === 0 ? "0.0%" : `${(Math.floor(Math.min(1, number(p.pagesPresent) / total) * 1000) / 10).toFixed(1)}%`;
}
export function share(part, whole) {
  const percent = (100 * part) / whole;
  if (!whole || !part) return "0 %";
  return percent < 1 ? "under 1 %" : `${percent.toFixed(0)} %`;
}

export const plural = (n, noun) => (number(n) === 1 ? `1 ${noun}` : `${grouped(n)} ${noun}s`);
export const clock = (t) => (t ? new Date(t).toLocaleTimeString("en-GB") : "–");
export const date = (t) => (t ? new Date(t).toLocaleString("en-GB") : "–");

// word of a value of an enumeration: "postcopy-active".
const prefixes = /^(MIGRATION_STATE|MIGRATION_ROLE|LOCATION|REASON)_/;
export const word = (value) => (value ?? "").replace(prefixes, "").toLowerCase().replaceAll("_", "-");

// waits says whether the VM's memory cannot come in this state. An attempt to connect again is no end of that.
export const waits = (state) => ["postcopy-paused", "postcopy-recover"].includes(word(state));

const over = new Set(["completed", "failed", "cancelled", "rehearsed", "ended"]);
export const isOver = (state) => over.has(state);
const tones = {
  completed: "good", rehearsed: "good", failed: "bad", "postcopy-paused": "bad", "postcopy-recover": "warn", handover: "warn",
  ended: "warn", device: "busy", "postcopy-active": "busy",
};
export const tone = (state) => tones[state] ?? "";

export const vmName = (m) => m.vmName || m.spec?.vm || "–";
export const keyOf = (m) => `${m.id}/${word(m.role)}`;

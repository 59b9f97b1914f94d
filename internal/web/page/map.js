// SPDX-License-Identifier: Apache-2.0
//
// The VM's memory as a map that fills: a square is a cell, filled from below by what is there of it; a dot in it says that
// threads of the VM had to wait for pages of it, the larger the more of them.
import { h, text, table } from "./dom.js";
import { bytes, grouped, share } from "./format.js";

const kinds = [
  ["there", "present", "there"],
  ["zero", "zero", "zero: nothing to bring"],
  ["flight", "inFlight", "on its way"],
  ["waited", "waitedFor", "on its way, and waited for"],
  ["missing", "missing", "missing"],
];

const sum = (list) => (list ?? []).reduce((a, b) => a + b, 0);

// totals adds all cells.
export function totals(memory) {
  const t = { faulted: 0, pages: 0 };
  for (const [, field] of kinds) t[field] = 0;
  for (const block of memory?.blocks ?? []) {
    for (const [, field] of kinds) t[field] += sum(block[field]);
    t.faulted += sum(block.faulted);
  }
  for (const [, field] of kinds) t.pages += t[field];
  return t;
}

// cellsOf are those of all blocks one after the other, the largest block first, with a gap between them.
function cellsOf(memory) {
  const cells = [];
  for (const block of [...memory.blocks].sort((a, b) => Number(b.size) - Number(a.size))) {
    if (cells.length > 0) cells.push(null);
    const inCell = Number(block.pagesPerCell);
    (block.missing ?? []).forEach((missing, i) => {
      const cell = { block, index: i, inCell, missing, faulted: block.faulted[i], pages: missing };
      for (const field of ["present", "zero", "inFlight", "waitedFor"]) {
        cell[field] = block[field][i];
        cell.pages += cell[field];
      }
      cells.push(cell);
    });
  }
  return cells;
}

export function memoryMap() {
  const canvas = h("canvas", { role: "img" });
  const pointed = h("p", { class: "pointed", "aria-hidden": "true" });
  const counts = {};
  const legend = h("ul", { class: "legend" });
  for (const [name, field, label] of kinds) {
    counts[field] = h("span", { "data-pages": field });
    legend.append(h("li", { class: name }, h("i"), `${label} `, counts[field]));
  }
  counts.faulted = h("span", { "data-pages": "faulted" });
  legend.append(h("li", { class: "hot" }, h("i"), "threads had to wait for ", counts.faulted));
  const blocks = table("Memory by block", ["block", ["size", "number"], ["there", "number"], ["zero", "number"], ["missing", "number"], ["waited for", "number"]]);
  const unknown = h("p", { class: "quiet", hidden: true });
  const whole = h("div", {}, canvas, pointed, legend, h("details", {}, h("summary", {}, "By block"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Memory by block" }, blocks.element)));
  const element = h("figure", { class: "map" }, unknown, whole);

  let cells = [];
  let columns = 1;
  let pitch = 10;

  function draw() {
    const width = canvas.clientWidth;
    if (width === 0 || cells.length === 0) return;
    pitch = Math.max(7, Math.min(14, Math.sqrt((width * 260) / cells.length)));
    columns = Math.max(1, Math.floor(width / pitch));
    pitch = width / columns;
    const height = Math.ceil(cells.length / columns) * pitch;
    const scale = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const style = getComputedStyle(canvas);
    const colour = Object.fromEntries(["missing", "there", "zero", "flight", "waited", "hot", "ground"].map((name) => [name, style.getPropertyValue(`--${name}`)]));
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    const side = pitch - 1;
    cells.forEach((cell, i) => {
      if (!cell) return;
      const x = (i % columns) * pitch;
      let bottom = Math.floor(i / columns) * pitch + side;
      g.fillStyle = colour.missing;
      g.fillRect(x, bottom - side, side, side);
      for (const [name, field] of kinds.slice(0, -1)) {
        if (cell[field] === 0) continue;
        const part = Math.max((cell[field] / cell.pages) * side, name === "waited" ? 1.5 : 0);
        g.fillStyle = colour[name];
        g.fillRect(x, bottom - part, side, part);
        bottom -= part;
      }
      if (cell.faulted > 0) {
        const radius = side * (0.14 + 0.24 * Math.sqrt(Math.min(1, cell.faulted / cell.pages)));
        g.beginPath();
        g.arc(x + side / 2, Math.floor(i / columns) * pitch + side / 2, radius, 0, 2 * Math.PI);
        g.fillStyle = colour.hot;
        g.fill();
      }
    });
  }

  canvas.addEventListener("pointermove", (event) => {
    const cell = cells[Math.floor(event.offsetY / pitch) * columns + Math.min(columns - 1, Math.floor(event.offsetX / pitch))];
    if (!cell) return text(pointed, "");
    const page = Number(cell.block.pageSize);
    const from = cell.index * cell.inCell * page;
    const parts = kinds.filter(([, field]) => cell[field] > 0).map(([, field, label]) => `${grouped(cell[field])} ${label}`);
    if (cell.faulted > 0) parts.push(`${grouped(cell.faulted)} that a thread had to wait for`);
    text(pointed, `${cell.block.id} from ${bytes(from)} on, ${bytes(cell.pages * page)}: ${parts.join(", ")}`);
  });
  canvas.addEventListener("pointerleave", () => text(pointed, ""));
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  return {
    element,
    // update shows a map, or why there is none.
    update(memory, why) {
      unknown.hidden = Boolean(memory);
      whole.hidden = !memory;
      if (!memory) return text(unknown, why);
      cells = cellsOf(memory);
      const t = totals(memory);
      for (const [, field] of kinds) text(counts[field], `${grouped(t[field])} (${share(t[field], t.pages)})`);
      text(counts.faulted, grouped(t.faulted));
      canvas.setAttribute("aria-label", `Map of ${grouped(t.pages)} pages: ${share(t.present + t.zero, t.pages)} there or zero, ${share(t.missing, t.pages)} missing`);
      blocks.rows(memory.blocks.map((block) => {
        const pages = (field) => [grouped(sum(block[field])), "number"];
        return [block.id, [bytes(block.size), "number"], pages("present"), pages("zero"), pages("missing"), pages("faulted")];
      }));
      draw();
    },
  };
}

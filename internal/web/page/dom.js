// SPDX-License-Identifier: Apache-2.0
//
// Elements are made once and their text is changed where it differs: who listens to the page is not told what stayed.

// h makes an element. An attribute that is a function listens to its event; one that is false or undefined is left out.
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null));
  return element;
}

export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.flat());
  return element;
}

export function text(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

export function attribute(element, name, value) {
  if (value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// show hides an element, or shows it.
export function show(element, shown) {
  if (element.hidden === shown) element.hidden = !shown;
}

// rows makes the body of a table have these rows, of texts; a number is [text, "number"]. Cells that stay are left alone.
export function rows(body, list) {
  while (body.rows.length > list.length) body.deleteRow(-1);
  list.forEach((cells, i) => {
    const row = body.rows[i] ?? body.insertRow();
    while (row.cells.length > cells.length) row.deleteCell(-1);
    cells.forEach((cell, j) => {
      const [value, className] = Array.isArray(cell) ? cell : [cell, ""];
      let at = row.cells[j];
      if (!at) {
        at = document.createElement(j === 0 ? "th" : "td");
        if (j === 0) at.scope = "row";
        row.append(at);
      }
      if (at.className !== className) at.className = className;
      if (value instanceof Node) {
        if (at.firstChild !== value) at.replaceChildren(value);
      } else text(at, value);
    });
  });
}

// table has a caption and heads; a head is a number's as a cell is.
export function table(caption, heads) {
  const body = h("tbody");
  const cells = heads.map((head) => (Array.isArray(head) ? h("th", { scope: "col", class: head[1] }, head[0]) : h("th", { scope: "col" }, head)));
  const element = h("table", { class: "facts" }, h("caption", {}, caption), h("thead", {}, h("tr", {}, cells)), body);
  return { element, rows: (list) => rows(body, list) };
}

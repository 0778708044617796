// Elements, tables that are brought up to date in place, sparklines, bars.
//
// Rules: text becomes a text node, never markup. What stays the same is not touched, so that the focus, a selection and
// whoever listens to the page stay where they are.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

const drawn = new WeakMap();

// Draw anew into `target` only if `value` is not what was drawn before.
export function redraw(target, value, draw) {
  const text = JSON.stringify(value);
  if (drawn.get(target) === text) return;
  drawn.set(target, text);
  target.replaceChildren(...draw(value));
}

// A table whose rows have a `key`; columns are {title, sort, number, ofCluster, draw: row -> [what to compare, () -> nodes]}.
export class Table {
  constructor(table, columns, onSort) {
    this.columns = columns;
    this.body = element("tbody", { role: "rowgroup" });
    this.rows = new Map();
    this.sorts = new Map();
    const headings = columns.map((column) => this.#heading(column, onSort));
    table.setAttribute("role", "table");
    const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...headings));
    table.replaceChildren(head, this.body);
  }

  #heading(column, onSort) {
    const attributes = { scope: "col", role: "columnheader", class: kindOf(column) };
    if (!column.sort) return element("th", attributes, column.title);
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => onSort(column.sort));
    const heading = element("th", attributes, button);
    this.sorts.set(column.sort, heading);
    return heading;
  }

  showSort(sort) {
    for (const [name, heading] of this.sorts) {
      heading.setAttribute("aria-sort", name !== sort ? "none" : name === "name" || name === "node" ? "ascending" : "descending");
    }
  }

  update(rows) {
    const before = this.rows;
    this.rows = new Map();
    rows.forEach((row, place) => {
      const shown = before.get(row.key) ?? this.#make();
      before.delete(row.key);
      this.rows.set(row.key, shown);
      this.columns.forEach((column, number) => {
        const [value, draw] = column.draw(row);
        redraw(shown.cells[number], value, draw);
      });
      if (this.body.rows[place] !== shown) this.body.insertBefore(shown, this.body.rows[place] ?? null);
    });
    for (const gone of before.values()) gone.remove();
  }

  #make() {
    const cells = this.columns.map((column, number) => {
      const kind = { role: number === 0 ? "rowheader" : "cell", scope: number === 0 ? "row" : null };
      return element(number === 0 ? "th" : "td", { ...kind, "data-label": column.title, class: kindOf(column) });
    });
    return element("tr", { role: "row" }, ...cells);
  }
}

function kindOf({ number, ofCluster }) {
  return [number && "number", ofCluster && "of-cluster"].filter(Boolean).join(" ") || null;
}

const SVG = "http://www.w3.org/2000/svg";

function shape(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// The last `slots` values from left to right, drawn from zero to the largest of them.
export function sparkline(values, slots, words) {
  const top = Math.max(...values, 1);
  const first = slots - values.length;
  const points = values.map((value, place) => `${first + place},${(19 - (18 * value) / top).toFixed(1)}`);
  const label = `${words(values.at(-1) ?? 0)} now, at most ${words(Math.max(...values, 0))} in the last minutes`;
  const drawing = shape("svg", { viewBox: `0 0 ${slots - 1} 20`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  if (points.length > 1) {
    drawing.append(shape("polygon", { points: `${first},20 ${points.join(" ")} ${slots - 1},20` }));
    drawing.append(shape("polyline", { points: points.join(" ") }));
  }
  return drawing;
}

// How much of something is used, in percent; the text beside it says the same.
export function bar(percent, mark = "") {
  const filled = element("span");
  filled.style.width = `${Math.min(100, Math.max(0, percent))}%`;
  return element("span", { class: `meter ${mark}`, "aria-hidden": "true" }, filled);
}

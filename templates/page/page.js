"use strict";

// Along one axis: the query's dilation group, its window, its Q tile and the KV tiles of that, in positions of the group.
function along(axis, token) {
  const group = token % axis.dilation, position = (token - group) / axis.dilation;
  const number = Math.floor(position / axis.q);
  const [origin, count, first, last] = axis.tiles[group][number];
  const length = axis.windows[group].length;
  const q = [number * axis.q, Math.min((number + 1) * axis.q, length)];
  return { group, length, window: axis.windows[group][position], q, origin, count, first, last };
}

// Interior tiles along an axis; where there are none along one axis, there are none at all.
function interior(part) { return Math.max(part.last - part.first, 0); }

// What a sentence says of a query: numbers only.
function facts(pattern, query) {
  const parts = pattern.axes.map((axis, d) => along(axis, query[d]));
  const times = (f) => parts.reduce((all, part, d) => all * f(part, pattern.axes[d]), 1);
  const tiles = times((part) => part.count), inner = times(interior);
  return {
    keys: times((part) => part.window[1] - part.window[0]),
    queries: times((part) => part.q[1] - part.q[0]),
    tiles, interior: inner, shell: tiles - inner,
    computed: tiles * times((part, axis) => axis.kv * axis.q),
  };
}

// Tokens [begin, end) that positions [begin, end) of a group cover in the picture: each reaches to the next of its group.
function span(axis, part, begin, end) {
  return [begin, end].map((position) => position * axis.dilation + part.group - 0.5);
}

const MOST_SHAPES = 4000;

// Boxes {kind, y, x, height, width} of the plane of the last two axes (one: of the only one), in tokens. `slice` is a key's
// token along the first of three axes.
function boxes(pattern, query, slice) {
  const parts = pattern.axes.map((axis, d) => along(axis, query[d]));
  let outer = null, seen = true;
  if (parts.length === 3) {
    const axis = pattern.axes[0], part = parts[0], position = (slice - part.group) / axis.dilation;
    const end = part.origin + part.count * axis.kv;
    if (!Number.isInteger(position) || position < part.origin || position >= end) return [];
    const tile = Math.floor((position - part.origin) / axis.kv);
    outer = tile >= part.first && tile < part.last;
    seen = position >= part.window[0] && position < part.window[1];
  }
  const plane = pattern.axes.length === 1 ? [null, pattern.axes[0]] : pattern.axes.slice(-2);
  const both = pattern.axes.length === 1 ? [null, parts[0]] : parts.slice(-2);
  const found = [];
  const add = (kind, rows, columns) =>
    found.push({ kind, y: rows[0], x: columns[0], height: rows[1] - rows[0], width: columns[1] - columns[0] });
  const whole = [-0.5, 0.5];
  const pieces = (axis, part) => {
    if (axis === null) return [[whole, true]];
    return Array.from({ length: part.count }, (_, i) => [
      span(axis, part, part.origin + i * axis.kv, part.origin + (i + 1) * axis.kv), i >= part.first && i < part.last]);
  };
  const rows = pieces(plane[0], both[0]), columns = pieces(plane[1], both[1]);
  if (rows.length * columns.length <= MOST_SHAPES)
    for (const [y, inner] of rows)
      for (const [x, alsoInner] of columns)
        add(outer !== false && inner && alsoInner ? "interior" : "shell", y, x);
  const window = (axis, part) => axis === null ? whole : span(axis, part, ...part.window);
  if (seen) {
    const dilated = plane.some((axis) => axis !== null && axis.dilation > 1);
    const tokens = (axis, part) => axis === null ? [0] :
      Array.from({ length: part.window[1] - part.window[0] }, (_, i) => (part.window[0] + i) * axis.dilation + part.group);
    const ys = tokens(plane[0], both[0]), xs = tokens(plane[1], both[1]);
    if (dilated && ys.length * xs.length <= MOST_SHAPES)
      for (const y of ys) for (const x of xs) add("key", [y - 0.5, y + 0.5], [x - 0.5, x + 0.5]);
    else add("window", window(plane[0], both[0]), window(plane[1], both[1]));
  }
  if (parts.length < 3 || slice === query[0]) {
    const tile = (axis, part) => axis === null ? whole : span(axis, part, ...part.q);
    add("q_tile", tile(plane[0], both[0]), tile(plane[1], both[1]));
    const at = (axis, d) => axis === null ? whole : [query[d] - 0.5, query[d] + 0.5];
    add("query", at(plane[0], query.length - 2), at(plane[1], query.length - 1));
  }
  return found;
}

function sentence(pattern, query) {
  const f = facts(pattern, query), n = (x) => x.toLocaleString("en");
  return `The query (${query.join(", ")}) sees ${n(f.keys)} keys. Its Q tile of ${n(f.queries)} queries visits ${n(f.tiles)} ` +
    `KV tiles: ${n(f.interior)} interior, without a mask, and ${n(f.shell)} shell. That computes ${n(f.computed)} pairs.`;
}

function showPattern(section) {
  const pattern = JSON.parse(section.querySelector("script").textContent), axes = pattern.axes;
  const query = axes.map((axis) => Math.floor(axis.length / 2));
  let slice = query[0];
  const make = (tag, parent, settings = {}) => parent.appendChild(Object.assign(document.createElement(tag), settings));
  const controls = make("div", section), said = make("p", section, { className: "facts" });
  said.setAttribute("aria-live", "polite");
  const svg = section.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  const height = axes.length === 1 ? 1 : axes.at(-2).length, width = axes.at(-1).length;
  const tall = axes.length === 1 ? Math.max(width / 12, 1) : height;  // a line of tokens is drawn as a band
  svg.setAttribute("viewBox", `-0.5 -0.5 ${width} ${tall}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.style.aspectRatio = `${width} / ${tall}`;
  const inputs = axes.map((axis, d) =>
    number(`query ${axis.name}`, axis.length, () => query[d], (value) => { query[d] = value; }));
  if (axes.length === 3)
    inputs.push(number(`keys of ${axes[0].name}`, axes[0].length, () => slice, (value) => { slice = value; }));
  function number(name, length, get, set) {
    const label = make("label", controls, { textContent: `${name} ` });
    const input = make("input", label, { type: "number", min: 0, max: length - 1 });
    input.addEventListener("input", () => {
      if (input.checkValidity() && input.value !== "") { set(Number(input.value)); draw(); }
    });
    return () => { if (Number(input.value) !== get() || input.value === "") input.value = get(); };
  }
  const legend = make("p", section, { className: "legend" });
  for (const [colour, text] of [["--orange", "query and its Q tile"], ["--blue", "keys that the query sees"],
    ["--green", "interior KV tiles"], ["--yellow", "shell KV tiles"]]) {
    const item = make("span", legend);
    make("i", item).style.background = `var(${colour})`;
    item.append(text);
  }
  function draw() {
    for (const show of inputs) show();
    said.textContent = sentence(pattern, query);
    svg.setAttribute("aria-label", said.textContent);
    const stretch = axes.length === 1 ? tall : 1;
    svg.replaceChildren(...boxes(pattern, query, slice).map((box) => {
      const shape = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const size = { x: box.x, width: box.width, y: (box.y + 0.5) * stretch - 0.5, height: box.height * stretch };
      for (const name in size) shape.setAttribute(name, size[name]);
      shape.setAttribute("class", box.kind);
      return shape;
    }));
  }
  function point(event) {
    const place = svg.getBoundingClientRect(), inside = (value, n) => Math.min(Math.max(Math.floor(value * n), 0), n - 1);
    query[query.length - 1] = inside((event.clientX - place.left) / place.width, width);
    if (axes.length > 1) query[query.length - 2] = inside((event.clientY - place.top) / place.height, height);
    draw();
  }
  svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); point(event); });
  svg.addEventListener("pointermove", (event) => { if (event.buttons) point(event); });
  draw();
}

// Rows by a column, numbers as numbers, empty cells last; the other way round if they were so already.
function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const down = heads[column].getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = [...body.rows].sort((a, b) => compare(value(a), value(b), down));
  heads.forEach((head, i) => i === column ? head.setAttribute("aria-sort", down ? "descending" : "ascending")
                                          : head.removeAttribute("aria-sort"));
  body.append(...rows);
}

function compare(a, b, down) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const both = [a, b].map(Number), order = both.some(Number.isNaN) ? a.localeCompare(b, "en") : both[0] - both[1];
  return down ? -order : order;
}

if (typeof document !== "undefined") {
  for (const section of document.querySelectorAll(".pattern")) showPattern(section);
  for (const table of document.querySelectorAll("table"))
    [...table.tHead.rows[0].cells].forEach((head, i) =>
      head.firstElementChild.addEventListener("click", () => sortTable(table, i)));
}
if (typeof module !== "undefined") module.exports = { facts, boxes, compare, sortTable };

"use strict";

// Along one axis: the query's dilation group, the intervals that it sees, its Q tile and the runs of KV tiles of that, in
// positions of the group in the grid.
function along(axis, token) {
  const place = token + axis.offset, group = place % axis.dilation, own = axis.groups[group];
  const row = (place - group) / axis.dilation - own.first, number = Math.floor(row / axis.q);
  const [count, interior, runs] = own.tiles[number];
  const begin = own.first + number * axis.q;
  const q = [begin, Math.min(begin + axis.q, own.first + own.windows.length)];
  return { group, windows: own.windows[row], q, count, interior, runs };
}

// The pattern with a kind of edge or mask, and tokens of a sink, picked for each axis: [kind, sink], or null to leave it.
function chosen(pattern, picks) {
  const pick = (axis, picked) => picked === null ? axis : { ...axis, groups: axis.choices[picked[0]][picked[1]] };
  return { ...pattern, axes: pattern.axes.map((axis, d) => pick(axis, picks[d])) };
}

// What a sentence says of a query: numbers only. Extra keys are seen by all queries, and are tiles of their own.
function facts(pattern, query) {
  const parts = pattern.axes.map((axis, d) => along(axis, query[d])), extra = pattern.extra;
  const times = (f) => parts.reduce((all, part, d) => all * f(part, pattern.axes[d]), 1);
  const tiles = times((part) => part.count) + extra.tiles, inner = times((part) => part.interior) + extra.interior;
  return {
    keys: times((part) => part.windows.reduce((sum, [begin, end]) => sum + end - begin, 0)), extra: extra.keys,
    queries: times((part) => part.q[1] - part.q[0]),
    tiles, interior: inner, shell: tiles - inner,
    computed: tiles * times((part, axis) => axis.kv * axis.q),
  };
}

// Tokens [begin, end) that positions [begin, end) of a group cover in the picture: each reaches to the next of its group.
function span(axis, part, begin, end) {
  return [begin, end].map((position) => position * axis.dilation + part.group - 0.5);
}

// The tiles of runs: where each begins and ends, and whether it is interior.
function tilesOf(part) {
  return part.runs.flatMap(([begin, extent, count, first, last]) =>
    Array.from({ length: count }, (_, i) => [begin + i * extent, begin + (i + 1) * extent, i >= first && i < last]));
}

const MOST_SHAPES = 4000;

// Boxes {kind, y, x, height, width} of the plane of the last two axes (one: of the only one), in tokens. `slice` is a key's
// token along the first of three axes.
function boxes(pattern, query, slice) {
  const parts = pattern.axes.map((axis, d) => along(axis, query[d]));
  let outer = null, seen = true;
  if (parts.length === 3) {
    const axis = pattern.axes[0], part = parts[0], position = (slice - part.group) / axis.dilation;
    const here = tilesOf(part).filter(([begin, end]) => begin <= position && position < end);
    if (!Number.isInteger(position) || here.length === 0) return [];
    outer = here.some(([, , inner]) => inner);
    seen = part.windows.some(([begin, end]) => position >= begin && position < end);
  }
  const plane = pattern.axes.length === 1 ? [null, pattern.axes[0]] : pattern.axes.slice(-2);
  const both = pattern.axes.length === 1 ? [null, parts[0]] : parts.slice(-2);
  const found = [];
  const add = (kind, rows, columns) =>
    found.push({ kind, y: rows[0], x: columns[0], height: rows[1] - rows[0], width: columns[1] - columns[0] });
  const whole = [-0.5, 0.5];
  const pieces = (axis, part) => axis === null ? [[whole, true]] :
    tilesOf(part).map(([begin, end, inner]) => [span(axis, part, begin, end), inner]);
  const rows = pieces(plane[0], both[0]), columns = pieces(plane[1], both[1]);
  if (rows.length * columns.length <= MOST_SHAPES)
    for (const [y, inner] of rows)
      for (const [x, alsoInner] of columns)
        add(outer !== false && inner && alsoInner ? "interior" : "shell", y, x);
  if (seen) {
    const dilated = plane.some((axis) => axis !== null && axis.dilation > 1);
    const tokens = (axis, part) => axis === null ? [0] : part.windows.flatMap(([begin, end]) =>
      Array.from({ length: end - begin }, (_, i) => (begin + i) * axis.dilation + part.group));
    const windows = (axis, part) => axis === null ? [whole] : part.windows.map((each) => span(axis, part, ...each));
    const ys = tokens(plane[0], both[0]), xs = tokens(plane[1], both[1]);
    if (dilated && ys.length * xs.length <= MOST_SHAPES)
      for (const y of ys) for (const x of xs) add("key", [y - 0.5, y + 0.5], [x - 0.5, x + 0.5]);
    else for (const y of windows(plane[0], both[0])) for (const x of windows(plane[1], both[1])) add("window", y, x);
  }
  const place = query.map((token, d) => token + pattern.axes[d].offset);
  if (parts.length < 3 || slice === place[0]) {
    const tile = (axis, part) => axis === null ? whole : span(axis, part, ...part.q);
    add("q_tile", tile(plane[0], both[0]), tile(plane[1], both[1]));
    const at = (axis, d) => axis === null ? whole : [place[d] - 0.5, place[d] + 0.5];
    add("query", at(plane[0], query.length - 2), at(plane[1], query.length - 1));
  }
  return found;
}

function sentence(pattern, query) {
  const f = facts(pattern, query), n = (x) => x.toLocaleString("en");
  const extra = f.extra ? ` and ${n(f.extra)} extra ones, which have no place here` : "";
  return `The query (${query.join(", ")}) sees ${n(f.keys)} keys${extra}. Its Q tile of ${n(f.queries)} queries visits ${n(f.tiles)} ` +
    `KV tiles: ${n(f.interior)} interior, without a mask, and ${n(f.shell)} shell. That computes ${n(f.computed)} pairs.`;
}

function showPattern(section) {
  const given = JSON.parse(section.querySelector("script").textContent), axes = given.axes;
  const picks = axes.map((axis) => axis.choices ? [...axis.own] : null);
  const query = axes.map((axis) => Math.floor(axis.length / 2));
  let slice = query[0] + axes[0].offset;
  const make = (tag, parent, settings = {}) => parent.appendChild(Object.assign(document.createElement(tag), settings));
  const controls = make("div", section), said = make("p", section, { className: "facts" });
  said.setAttribute("aria-live", "polite");
  const svg = section.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
  const height = axes.length === 1 ? 1 : axes.at(-2).grid, width = axes.at(-1).grid;
  const tall = axes.length === 1 ? Math.max(width / 12, 1) : height;  // a line of tokens is drawn as a band
  svg.setAttribute("viewBox", `-0.5 -0.5 ${width} ${tall}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.style.aspectRatio = `${width} / ${tall}`;
  const inputs = axes.map((axis, d) =>
    number(`query ${axis.name}`, axis.length, () => query[d], (value) => { query[d] = value; }));
  if (axes.length === 3)
    inputs.push(number(`keys of ${axes[0].name}`, axes[0].grid, () => slice, (value) => { slice = value; }));
  axes.forEach((axis, d) => {
    if (!axis.choices) return;
    const kinds = list(`${axis.name} is`, Object.keys(axis.choices), () => picks[d][0], (kind) => {
      picks[d] = [kind, picks[d][1] in axis.choices[kind] ? picks[d][1] : "0"];
    });
    const sinks = [...new Set(Object.values(axis.choices).flatMap(Object.keys))];
    inputs.push(kinds, list(`sink of ${axis.name}`, sinks, () => picks[d][1], (sink) => {
      if (sink in axis.choices[picks[d][0]]) picks[d][1] = sink;
    }));
  });
  function list(name, values, get, set) {
    const label = make("label", controls, { textContent: `${name} ` }), choice = make("select", label);
    for (const value of values) make("option", choice, { value, textContent: value });
    choice.addEventListener("change", () => { set(choice.value); draw(); });
    return () => { choice.value = get(); };
  }
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
    const pattern = chosen(given, picks);
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
    const place = svg.getBoundingClientRect();
    const inside = (axis, share) => Math.min(Math.max(Math.floor(share * axis.grid) - axis.offset, 0), axis.length - 1);
    query[query.length - 1] = inside(axes.at(-1), (event.clientX - place.left) / place.width);
    if (axes.length > 1) query[query.length - 2] = inside(axes.at(-2), (event.clientY - place.top) / place.height);
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
if (typeof module !== "undefined") module.exports = { chosen, facts, boxes, compare, sortTable };

"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const leaves = data.leaves;
const byId = (id) => document.getElementById(id);

// --- small things

/** An element with a class, and children that are elements or text: text is never read as HTML. */
function el(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function bytesText(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = count, i = 0;
  while (size >= 1024 && i < units.length - 1) { size /= 1024; i += 1; }
  return i === 0 ? `${count} B` : `${size.toFixed(1)} ${units[i]}`;
}

const plural = (count, one) => `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;
const tuple = (items) => `(${items.join(", ")})`;
const group = (leaf) => leaf.path.split("/")[0];
const specText = (leaf) => {
  const parts = leaf.spec.map((axes) => (axes.length > 1 ? tuple(axes) : axes[0] ?? "-"));
  while (parts.length && parts.at(-1) === "-") parts.pop();
  return tuple(parts);
};
const isLoss = (given) => given.why !== "not in the mesh" && given.why !== "size 1";

const AXIS_HUES = { data: 150, stage: 330, fsdp: 250, fsdp2: 285, expert: 25, context: 195, tensor: 75 };
const hues = Object.fromEntries(
  data.mesh.axes.map((axis, i) => [axis.name, AXIS_HUES[axis.name] ?? (110 + 47 * i) % 360]),
);

function axisChip(axis, text = axis, name = "axis") {
  const chip = el("span", name, text);
  chip.style.setProperty("--hue", hues[axis] ?? 0);
  return chip;
}

/** A path that may be broken after each slash, its last part emphasised. */
function pathParts(path) {
  const parts = path.split("/");
  const last = parts.pop();
  return [...parts.flatMap((part) => [`${part}/`, el("wbr")]), el("b", "", last)];
}

function notes(leaf) {
  const said = [];
  if (leaf.problems.length) said.push(plural(leaf.problems.length, "problem"));
  if (leaf.origin !== "its box") said.push(leaf.origin);
  for (const dim of leaf.dims) {
    for (const given of dim.given_up.filter(isLoss)) said.push(`${dim.name} not ${given.axis}: ${given.why}`);
  }
  return said;
}

// --- light and dark

const themeButton = byId("theme");
const systemDark = matchMedia("(prefers-color-scheme: dark)");

function remembered(value) {
  try { // a page opened from a file may have no storage
    if (value !== undefined) localStorage.setItem("shardflax-theme", value);
    return localStorage.getItem("shardflax-theme");
  } catch { return null; }
}

function isDark() {
  const said = document.documentElement.dataset.theme;
  return said ? said === "dark" : systemDark.matches;
}

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  themeButton.setAttribute("aria-pressed", String(isDark()));
}

themeButton.addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  remembered(theme);
  showTheme(theme);
});
systemDark.addEventListener("change", () => showTheme());
showTheme(remembered());

// --- what there is

function showFacts() {
  const mesh = data.mesh;
  const sizes = mesh.axes.map((axis) => `${axis.name}=${axis.size}`).join(", ");
  const slices = mesh.slices > 1 ? ` in ${mesh.slices} slices` : "";
  byId("title").textContent = data.title || "Layout";
  byId("subtitle").textContent =
    `on ${sizes || "one device"} (${plural(mesh.devices, "device")}${slices}) under the rules ${data.rules.title}`;
  const facts = [
    ["Per device", bytesText(data.bytes_per_device)],
    ["Whole state", bytesText(data.bytes)],
    ["Devices", mesh.devices.toLocaleString("en")],
    ["Leaves", leaves.length.toLocaleString("en")],
    ["Problems", data.problems.length.toLocaleString("en")],
  ];
  byId("facts").append(...facts.map(([what, value]) => el("div", "", el("dt", "", what), el("dd", "", value))));
  if (data.problems.length) byId("facts").lastElementChild.className = "wrong";
}

function showProblems() {
  if (!data.problems.length) return;
  const section = byId("problems");
  section.hidden = false;
  section.querySelector("h2").textContent = plural(data.problems.length, "problem");
  section.querySelector("ul").append(...data.problems.map((problem) => {
    const i = leaves.findIndex((leaf) => leaf.path === problem.path);
    if (i < 0) return el("li", "", problem.path ? `${problem.path}: ` : "", problem.text);
    const button = el("button", "", problem.path);
    button.type = "button";
    button.addEventListener("click", () => open(i));
    return el("li", "", button, `: ${problem.text}`);
  }));
}

// --- the mesh

const MOST_CELLS = 4096;

/** Draws the mesh into a container; `paint(coords)` gives {color, text, title} of a device. */
function drawMesh(container, width, paint) {
  const axes = data.mesh.axes;
  const inner = axes.map((axis, k) => ({ k, name: axis.name, size: axis.ici })).filter((a) => a.size > 1);
  const perSlice = inner.reduce((n, axis) => n * axis.size, 1);
  const slices = Math.max(1, Math.min(data.mesh.slices, Math.floor(MOST_CELLS / perSlice)));
  const sides = matrixSides(inner.slice(-2));
  const room = data.mesh.slices > 1 ? width - 60 : width;
  const most = perSlice * slices <= 64 ? 32 : perSlice * slices <= 256 ? 24 : perSlice * slices <= 1024 ? 14 : 9;
  const share = Math.floor((room - 60) / sides.columns);
  const cell = Math.max(3, Math.min(most, share - (share > 10 ? 2 : 1)));
  container.style.setProperty("--cell", `${cell}px`);
  container.style.setProperty("--gap", cell > 8 ? "2px" : "1px");
  const all = el("div", "blocks");
  for (let s = 0; s < slices; s += 1) {
    const start = sliceStart(s);
    const drawn = drawBlock(inner, start, cell, paint);
    if (data.mesh.slices === 1) { all.append(drawn); continue; }
    const where = axes.filter((a) => a.dcn > 1).map((a) => `${a.name} ${range(start[axes.indexOf(a)], a.ici)}`);
    all.append(el("div", "block slice", el("div", "label", `slice ${s}: ${where.join(", ")}`), drawn));
  }
  container.replaceChildren(all);
  if (slices < data.mesh.slices) container.append(el("p", "quiet", `… and ${data.mesh.slices - slices} slices more`));
}

const range = (from, count) => (count > 1 ? `${from}–${from + count - 1}` : String(from));

/** The coordinates at which a slice begins. */
function sliceStart(index) {
  const start = [];
  for (const axis of [...data.mesh.axes].reverse()) {
    start.unshift((index % axis.dcn) * axis.ici);
    index = Math.floor(index / axis.dcn);
  }
  return start;
}

/** How the last two axes are drawn: the longer one across; a lone long axis in several rows. */
function matrixSides(last) {
  if (last.length < 2) {
    const size = last.length ? last[0].size : 1;
    return { columns: size > 32 ? 32 : size };
  }
  const [a, b] = last;
  const [down, across] = a.size > b.size && a.size > 16 ? [b, a] : [a, b];
  return { down, across, columns: across.size };
}

function drawBlock(axes, start, cell, paint) {
  if (axes.length <= 2) return drawMatrix(axes, start, cell, paint);
  const [first, ...rest] = axes;
  const blocks = el("div", "blocks");
  for (let i = 0; i < first.size; i += 1) {
    const at = start.with(first.k, start[first.k] + i);
    blocks.append(el("div", "block", el("div", "label", `${first.name} ${at[first.k]}`), drawBlock(rest, at, cell, paint)));
  }
  return blocks;
}

function drawMatrix(axes, start, cell, paint) {
  const { down, across, columns } = matrixSides(axes);
  const matrix = el("div", "matrix");
  if (!across) {
    matrix.style.gridTemplateColumns = `repeat(${columns}, auto)`;
    if (axes.length) matrix.append(spanning(el("div", "across", `${axes[0].name} →`), "1 / -1"));
    for (let i = 0; i < (axes[0]?.size ?? 1); i += 1) {
      matrix.append(drawCell(axes.length ? start.with(axes[0].k, start[axes[0].k] + i) : start, cell, paint));
    }
    return matrix;
  }
  const indexed = cell >= 16;
  matrix.style.gridTemplateColumns = `auto auto repeat(${columns}, auto)`;
  matrix.append(el("span", ""), el("span", ""), spanning(el("div", "across", `${across.name} →`), "3 / -1"));
  if (indexed) {
    matrix.append(el("span", ""), el("span", ""));
    for (let j = 0; j < across.size; j += 1) matrix.append(el("span", "index", String(start[across.k] + j)));
  }
  for (let i = 0; i < down.size; i += 1) {
    if (i === 0) {
      const label = el("div", "down", `${down.name} →`);
      label.style.gridRow = `span ${down.size}`;
      label.style.gridColumn = "1";
      matrix.append(label);
    }
    const index = el("span", "index", indexed ? String(start[down.k] + i) : "");
    index.style.gridColumn = "2";
    matrix.append(index);
    for (let j = 0; j < across.size; j += 1) {
      const at = start.with(down.k, start[down.k] + i).with(across.k, start[across.k] + j);
      matrix.append(drawCell(at, cell, paint));
    }
  }
  return matrix;
}

function spanning(element, columns) {
  element.style.gridColumn = columns;
  return element;
}

function drawCell(at, cell, paint) {
  const { color, text, title } = paint(at);
  const device = el("div", "cell", cell >= 20 ? text : "");
  device.title = title;
  if (color) { device.style.background = color; device.style.color = "#16202e"; }
  return device;
}

const place = (at) => data.mesh.axes.reduce((n, axis, k) => n * axis.size + at[k], 0);
const deviceName = (at) => String(data.mesh.ids ? data.mesh.ids[place(at)] : place(at));
const coordinates = (at) => data.mesh.axes.map((axis, k) => `${axis.name} ${at[k]}`).join(", ");

function showMesh() {
  const container = byId("mesh");
  const legend = el("div", "axes", ...data.mesh.axes.map((axis) => {
    const networks = axis.dcn > 1 ? ` (${axis.dcn} slices × ${axis.ici})` : "";
    const kind = axis.type === "auto" ? "" : `, ${axis.type}`;
    return axisChip(axis.name, `${axis.name} = ${axis.size}${networks}${kind}`, "axis chip");
  }));
  container.before(legend);
  const draw = () => drawMesh(container, container.clientWidth, (at) => ({
    text: deviceName(at), title: `device ${deviceName(at)}: ${coordinates(at)}`,
  }));
  draw();
  let last = container.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(container.clientWidth - last) > 24) { last = container.clientWidth; draw(); }
  }).observe(container);
}

/** Which part of a leaf the device at some coordinates holds: its number, and its ranges. */
function partAt(leaf, at) {
  let number = 0;
  const ranges = leaf.dims.map((dim, d) => {
    let index = 0, parts = 1;
    for (const name of leaf.spec[d]) {
      const k = data.mesh.axes.findIndex((axis) => axis.name === name);
      index = index * data.mesh.axes[k].size + at[k];
      parts *= data.mesh.axes[k].size;
    }
    number = number * parts + index;
    return parts === 1 ? ":" : `${index * dim.local}:${(index + 1) * dim.local}`;
  });
  return { number, ranges };
}

function partColor(number, count) {
  const turn = count <= 12 ? number / count : (number * 0.381966) % 1;
  return `oklch(0.8 ${count === 1 ? 0.03 : 0.11} ${Math.round(360 * turn + 250) % 360})`;
}

// --- memory

const PART_HUES = [250, 75, 150, 330, 25, 195, 285, 110];
const partHue = (i) => `oklch(0.72 0.11 ${PART_HUES[i % PART_HUES.length]})`;
const MOST_BARS = 256;

function showMemory() {
  const parts = Object.entries(data.memory);
  const total = Math.max(data.bytes_per_device, 1);
  const legend = el("div", "legend");
  parts.forEach(([name, size], i) => {
    const swatch = el("span", "swatch");
    swatch.style.background = partHue(i);
    const share = el("span", "number quiet", `${((100 * size) / total).toFixed(size === total ? 0 : 1)} %`);
    legend.append(swatch, el("span", "", name), el("span", "number", bytesText(size)), share);
  });
  const ids = Array.from({ length: data.mesh.devices }, (_, i) => String(data.mesh.ids ? data.mesh.ids[i] : i));
  const drawn = ids.length <= MOST_BARS ? ids : [`all ${ids.length}`];
  const bars = el("div", "bars", ...drawn.map((id) => {
    const stack = el("div", "stack", ...parts.map(([, size], i) => {
      const piece = el("span", "");
      piece.style.cssText = `flex: ${size} 0 0; background: ${partHue(i)}`;
      return piece;
    }));
    stack.title = `device ${id}: ${bytesText(data.bytes_per_device)}`;
    return el("div", "device", el("span", "", id), stack);
  }));
  bars.style.setProperty("--bar", drawn.length === 1 ? "100%" : drawn.length > 64 ? "5.5rem" : drawn.length > 16 ? "9rem" : "14rem");
  byId("memory").append(legend, bars);
}

// --- the table

const COLUMNS = [
  { key: "path", head: "Path", value: (leaf) => leaf.path },
  { key: "shape", head: "Shape", value: (leaf) => leaf.bytes },
  { key: "dtype", head: "Dtype", value: (leaf) => leaf.dtype },
  { key: "names", head: "Names → axes", value: (leaf) => (leaf.names ?? []).join() },
  { key: "spec", head: "Spec", value: specText },
  { key: "bytes", head: "Bytes / device", value: (leaf) => leaf.bytes_per_device },
  { key: "notes", head: "Notes", value: (leaf) => notes(leaf).join() },
];
const tbody = document.querySelector("#table tbody");
const scroller = tbody.closest(".scroll");
const inOrder = new Intl.Collator("en", { numeric: true });
const view = { sort: null, descending: false, words: [], filter: "all", current: -1, order: leaves.map((_, i) => i), shown: [] };
const CHUNK = 150; // rows are made as the table is scrolled: of 2,000 at once, a browser thinks for seconds
const rows = new Map();
const rowOf = (i) => rows.get(i) ?? rows.set(i, makeRow(leaves[i], i)).get(i);
const texts = leaves.map((leaf) =>
  [leaf.path, leaf.dtype, tuple(leaf.shape), (leaf.names ?? ["unnamed"]).join(" "), specText(leaf), ...notes(leaf), ...leaf.problems]
    .join(" ").toLowerCase());

const FILTERS = [["all", "All", () => true]];
for (const name of Object.keys(data.memory)) FILTERS.push([`part:${name}`, name, (leaf) => group(leaf) === name]);
FILTERS.push(
  ["bad", "With problems", (leaf) => leaf.problems.length > 0],
  ["unnamed", "Unnamed", (leaf) => leaf.names === null],
  ["lost", "Gave up an axis", (leaf) => leaf.dims.some((dim) => dim.given_up.some(isLoss))],
);

function dimPill(dim) {
  const pill = el("span", "dim", el("span", dim.name ? "" : "quiet", dim.name ?? "–"));
  for (const axis of dim.taken) pill.append(axisChip(axis));
  return pill;
}

function makeRow(leaf, i) {
  const said = notes(leaf).join("; ");
  const cells = {
    path: pathParts(leaf.path),
    shape: [tuple(leaf.shape)],
    dtype: [leaf.dtype],
    names: [leaf.names === null ? el("span", "quiet", "no names") : el("div", "dims", ...leaf.dims.map(dimPill))],
    spec: [specText(leaf)],
    bytes: [bytesText(leaf.bytes_per_device)],
    notes: [said],
  };
  const row = el("tr", leaf.problems.length ? "bad" : leaf.names === null ? "unnamed" : "");
  row.append(...COLUMNS.map(({ key }) => el("td", key, ...cells[key])));
  row.tabIndex = -1;
  row.dataset.index = i;
  return row;
}

function makeTable() {
  const head = document.querySelector("#table thead tr");
  COLUMNS.forEach((column, c) => {
    const button = el("button", "", column.head);
    button.type = "button";
    button.addEventListener("click", () => sortBy(c));
    const cell = el("th", column.key, button);
    cell.scope = "col";
    head.append(cell);
  });
  for (const [key, text, test] of FILTERS) {
    const count = leaves.filter(test).length;
    if (key !== "all" && (count === 0 || (count === leaves.length && key.startsWith("part:")))) continue;
    const button = el("button", "", key === "all" ? text : `${text} ${count.toLocaleString("en")}`);
    button.type = "button";
    button.dataset.key = key;
    button.setAttribute("aria-pressed", String(key === "all"));
    button.addEventListener("click", () => { view.filter = key; showRows(); });
    byId("filters").append(button);
  }
  showRows();
}

function sortBy(column) {
  const numeric = ["shape", "bytes"].includes(COLUMNS[column].key);
  view.descending = view.sort === column ? !view.descending : numeric; // big ones first
  view.sort = column;
  const keys = leaves.map(COLUMNS[column].value);
  const sign = view.descending ? -1 : 1;
  const compare = numeric ? (a, b) => keys[a] - keys[b] : (a, b) => inOrder.compare(keys[a], keys[b]);
  view.order.sort((a, b) => sign * compare(a, b) || a - b);
  document.querySelectorAll("#table th").forEach((cell, c) => {
    if (c === column) cell.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
  showRows();
}

function visible() {
  const test = FILTERS.find(([key]) => key === view.filter)[2];
  return view.order.filter((i) => test(leaves[i]) && view.words.every((word) => texts[i].includes(word)));
}

function showRows() {
  view.shown = visible();
  tbody.replaceChildren();
  scroller.scrollTop = 0;
  showMore();
  byId("empty").hidden = view.shown.length > 0;
  byId("count").textContent = view.shown.length === leaves.length
    ? `${leaves.length.toLocaleString("en")} leaves`
    : `${view.shown.length.toLocaleString("en")} of ${leaves.length.toLocaleString("en")} leaves`;
  for (const button of byId("filters").children) {
    button.setAttribute("aria-pressed", String(button.dataset.key === view.filter));
  }
  makeReachable(view.shown.includes(view.current) ? view.current : view.shown[0]);
}

/** Adds the next rows to the table, or all up to a place in it. */
function showMore(upTo = tbody.children.length) {
  const more = view.shown.slice(tbody.children.length, upTo + CHUNK);
  tbody.append(...more.map(rowOf));
}

scroller.addEventListener("scroll", () => {
  if (scroller.scrollTop + 2 * scroller.clientHeight > scroller.scrollHeight) showMore();
}, { passive: true });

/** One row at a time can be reached with Tab; arrows go on from it. */
function makeReachable(i) {
  for (const row of tbody.querySelectorAll("tr[tabindex='0']")) row.tabIndex = -1;
  if (i !== undefined) rowOf(i).tabIndex = 0;
}

/** Moves the focus to the row at a place among those shown. */
function focusPlace(at) {
  if (at < 0 || at >= view.shown.length) return;
  if (at >= tbody.children.length - 1) showMore(at);
  const row = rowOf(view.shown[at]);
  makeReachable(view.shown[at]);
  row.focus({ preventScroll: true });
  row.scrollIntoView({ block: "nearest" });
}

tbody.addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (row && !String(getSelection())) open(Number(row.dataset.index));
});

tbody.addEventListener("keydown", (event) => {
  const at = view.shown.indexOf(Number(event.target.closest("tr").dataset.index));
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: view.shown.length - 1 };
  if (event.key in moves) {
    event.preventDefault();
    focusPlace(moves[event.key]);
    if (!byId("panel").hidden) open(Number(document.activeElement.dataset.index), false);
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    open(view.shown[at]);
  }
});

let typed;
byId("search").addEventListener("input", (event) => {
  clearTimeout(typed);
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  typed = setTimeout(() => { view.words = words; showRows(); }, leaves.length > 500 ? 80 : 0);
});
byId("search").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") { event.preventDefault(); focusPlace(0); }
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    byId("search").focus();
  } else if (event.key === "Escape" && !byId("panel").hidden && !(typing && event.target.value)) {
    close();
  }
});

// --- one leaf

function fact(what, ...value) {
  return [el("dt", "", what), el("dd", "", ...value)];
}

function ruleOf(dim) {
  const rule = el("div", "rule", el("span", "quiet", "rule"), el("code", "", `${dim.name}:`));
  if (!dim.rule.length) rule.append(el("span", "quiet", "no axes, replicated"));
  for (const entry of dim.rule) {
    const axis = entry.replace("?", "");
    rule.append(axisChip(axis, entry, dim.taken.includes(axis) ? "axis chip" : "axis chip lost"));
  }
  return rule;
}

function dimCard(leaf, dim, d) {
  const size = dim.local === dim.size ? `${dim.size}` : `${dim.size} → ${dim.local} a device`;
  const card = el("div", "one", el("div", "",
    el("span", "", el("span", "quiet", `dim ${d} `), el("span", "name", dim.name ?? "no name")),
    el("span", "mono", size)));
  if (dim.rule) card.append(ruleOf(dim));
  const why = el("ul", "why");
  for (const axis of dim.taken) {
    const size = data.mesh.axes.find((a) => a.name === axis)?.size ?? 1;
    const verb = leaf.problems.length ? "would take" : "takes";
    why.append(el("li", "", `${verb} ${axis}, ${size} parts${dim.rule ? "" : ": the name is a mesh axis"}`));
  }
  for (const { axis, why: reason } of dim.given_up) {
    why.append(el("li", isLoss({ why: reason }) ? "" : "quiet", `gives up ${axis}: ${reason}`));
  }
  if (!dim.rule && !dim.taken.length && leaf.names !== null) {
    why.append(el("li", "quiet", dim.name ? "no rule decides it: replicated" : "replicated, as its names say"));
  }
  if (why.children.length) card.append(why);
  return card;
}

function panelOf(i) {
  const leaf = leaves[i];
  const copies = data.mesh.devices / leaf.parts;
  const parts = leaf.problems.length
    ? "not cut, for there are problems"
    : leaf.parts === 1 ? "whole on every device"
    : `${plural(leaf.parts, "part")}, each on ${plural(copies, "device")}`;
  const python = leaf.spec.map((axes) => (axes.length > 1 ? `(${axes.map((a) => `'${a}'`).join(", ")})` : axes.length ? `'${axes[0]}'` : "None"));
  while (python.length && python.at(-1) === "None") python.pop();
  const facts = el("dl", "",
    ...fact("Array", el("code", "", `${leaf.dtype}[${leaf.shape.join(", ")}]`)),
    ...fact("Names from", leaf.origin),
    ...(leaf.rule_set === "stored" ? [] : fact("Rules for", leaf.rule_set)),
    ...fact("Spec", el("code", "", `P(${python.join(", ")})`)),
    ...fact("Per device", `${bytesText(leaf.bytes_per_device)} of ${bytesText(leaf.bytes)}`),
    ...fact("Parts", parts));
  const mesh = el("div", "mesh");
  drawMesh(mesh, Math.min(document.documentElement.clientWidth, 432) - 40, (at) => {
    const { number, ranges } = partAt(leaf, at);
    const held = ranges.length ? `[${ranges.join(", ")}]` : "the number";
    return {
      color: partColor(number, leaf.parts), text: String(number),
      title: `device ${deviceName(at)} (${coordinates(at)}): part ${number}, ${held}`,
    };
  });
  return [
    panelBar(i),
    ...leaf.problems.map((text) => el("div", "problem", text)),
    facts,
    ...(leaf.dims.length ? [el("h3", "", "Dims"), ...leaf.dims.map((dim, d) => dimCard(leaf, dim, d))] : []),
    el("h3", "", "Which device holds which part"),
    mesh,
  ];
}

function panelBar(i) {
  const shown = view.shown;
  const at = shown.indexOf(i);
  const make = (label, text, action, enabled = true) => {
    const button = el("button", "", text);
    button.type = "button";
    button.setAttribute("aria-label", label);
    button.title = label;
    button.disabled = !enabled;
    button.addEventListener("click", action);
    return button;
  };
  const title = el("h2", "", ...pathParts(leaves[i].path));
  title.id = "panel-title";
  return el("div", "bar", title,
    make("Previous leaf", "↑", () => open(shown[at - 1]), at > 0),
    make("Next leaf", "↓", () => open(shown[at + 1]), at >= 0 && at < shown.length - 1),
    make("Close", "✕", close));
}

function open(i, focus = true) {
  const panel = byId("panel");
  if (view.current >= 0) rowOf(view.current).removeAttribute("aria-selected");
  view.current = i;
  rowOf(i).setAttribute("aria-selected", "true");
  makeReachable(view.shown.includes(i) ? i : view.shown[0]);
  panel.replaceChildren(...panelOf(i));
  panel.hidden = false;
  panel.scrollTop = 0;
  document.body.classList.add("open");
  history.replaceState(null, "", `#${encodeURIComponent(leaves[i].path)}`);
  if (focus) panel.focus({ preventScroll: true });
}

function close() {
  byId("panel").hidden = true;
  document.body.classList.remove("open");
  history.replaceState(null, "", location.pathname + location.search);
  rowOf(view.current).removeAttribute("aria-selected");
  focusPlace(view.shown.indexOf(view.current));
}

// --- the rules

function ruleAxes(entry) {
  if (!entry.axes.length) return el("span", "quiet", "replicated");
  return el("div", "dims", ...entry.axes.map((axis) => axisChip(axis.replace("?", ""), axis, "axis chip")));
}

function showRules() {
  const used = new Map();
  for (const leaf of leaves) for (const dim of leaf.dims) used.set(dim.name, (used.get(dim.name) ?? 0) + 1);
  byId("rules").querySelector("h2").textContent = `Rules: ${data.rules.title}`;
  const sets = Object.entries(data.rules.sets ?? {});
  const heads = ["Name", "Axes, in order", ...sets.map(([kind]) => `For ${kind}`), "Leaves"];
  byId("rules").querySelector("thead tr").append(...heads.map((head) => el("th", "", head)));
  const byName = sets.map(([, entries]) => new Map(entries.map((entry) => [entry.name, entry])));
  byId("rules").querySelector("tbody").append(...data.rules.entries.map((entry) => {
    const others = byName.map((entries) => el("td", "", ruleAxes(entries.get(entry.name) ?? { axes: [] })));
    const count = used.get(entry.name) ?? 0;
    return el("tr", data.unused_rules.includes(entry.name) ? "unused" : "",
      el("td", "", entry.name), el("td", "", ruleAxes(entry)), ...others,
      el("td", "", count ? count.toLocaleString("en") : "–"));
  }));
  const said = [];
  if (data.unused_rules.length) said.push(`Rules that nothing used: ${data.unused_rules.join(", ")}.`);
  if (data.unused_axes.length) said.push(`Axes that nothing used: ${data.unused_axes.join(", ")}.`);
  byId("unused").textContent = said.join(" ");
  byId("rules").open = data.unused_axes.length > 0;
}

showFacts();
showProblems();
showMesh();
showMemory();
makeTable();
showRules();

const wanted = leaves.findIndex((leaf) => leaf.path === decodeURIComponent(location.hash.slice(1)));
if (wanted >= 0) open(wanted);

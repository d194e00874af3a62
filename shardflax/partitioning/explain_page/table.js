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

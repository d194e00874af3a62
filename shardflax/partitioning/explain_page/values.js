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

/** What is wrong, once for all leaves that are wrong in the same way: moments as their parameter. */
const problems = [...data.problems.reduce(
  (found, problem) => found.set(problem.text, [...(found.get(problem.text) ?? []), problem]), new Map(),
).values()];

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
    ["Problems", problems.length.toLocaleString("en")],
  ];
  byId("facts").append(...facts.map(([what, value]) => el("div", "", el("dt", "", what), el("dd", "", value))));
  if (problems.length) byId("facts").lastElementChild.className = "wrong";
}

function showProblems() {
  if (!problems.length) return;
  const section = byId("problems");
  section.hidden = false;
  section.querySelector("h2").textContent = plural(problems.length, "problem");
  section.querySelector("ul").append(...problems.map((same) => {
    // Parameters first: what is wrong with their moments follows from them.
    const problem = same.find(({ path }) => path.startsWith("params/")) ?? same[0];
    const i = leaves.findIndex((leaf) => leaf.path === problem.path);
    if (i < 0) return el("li", "", problem.path ? `${problem.path}: ` : "", problem.text);
    const more = same.length > 1 ? ` (and ${same.length - 1} ${same.length > 2 ? "leaves" : "leaf"} as it)` : "";
    const button = el("button", "", problem.path);
    button.type = "button";
    button.addEventListener("click", () => open(i));
    return el("li", "", button, `: ${problem.text}`, el("span", "quiet", more));
  }));
}

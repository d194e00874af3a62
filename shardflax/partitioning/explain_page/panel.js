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
  const idle = new Set([...data.unused_rules, ...data.unused_defaults]);
  const byName = sets.map(([, entries]) => new Map(entries.map((entry) => [entry.name, entry])));
  byId("rules").querySelector("tbody").append(...data.rules.entries.map((entry) => {
    const others = byName.map((entries) => el("td", "", ruleAxes(entries.get(entry.name) ?? { axes: [] })));
    const count = used.get(entry.name) ?? 0;
    return el("tr", idle.has(entry.name) ? "unused" : "",
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

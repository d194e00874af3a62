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
    const networks = axis.dcn > 1 ? ` (${axis.dcn} slices${axis.ici > 1 ? ` × ${axis.ici}` : ""})` : "";
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

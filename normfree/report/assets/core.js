"use strict";
// Numbers out of the page, elements into it, scales and colours. Words from a run only ever become text nodes.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NARROW = 560;

// ------------------------------------------------------------------------------------------------ packed numbers

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function fromBase64(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// The inverse of normfree.report.packing.pack: base64 of deflated byte planes, little-endian as every browser is.
async function unpack(packed) {
  const planes = await inflate(fromBase64(packed.text));
  const width = packed.packed === "f" ? 4 : 8;
  const size = planes.length / width;
  const bytes = new Uint8Array(planes.length);
  for (let b = 0; b < width; b++) {
    for (let i = 0; i < size; i++) bytes[i * width + b] = planes[b * size + i];
  }
  const values = width === 4 ? new Float32Array(bytes.buffer) : new Float64Array(bytes.buffer);
  values.shape = packed.shape;
  return values;
}

async function unpackAll(node) {
  if (node === null || typeof node !== "object") return;
  const waiting = Object.entries(node).map(async ([key, value]) => {
    if (value && value.packed) node[key] = await unpack(value);
    else await unpackAll(value);
  });
  await Promise.all(waiting);
}

// Record i of an array of shape (records, ...), as a view.
function record(values, i) {
  const size = values.shape.slice(1).reduce((a, b) => a * b, 1);
  return values.subarray(i * size, (i + 1) * size);
}

// Index of the newest record at or before this step; -1 where there is none yet.
function recordAt(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

// Index of the value nearest to x in an increasing array.
function nearest(values, x) {
  const i = recordAt(values, x);
  if (i < 0) return 0;
  return i + 1 < values.length && values[i + 1] - x < x - values[i] ? i + 1 : i;
}

// ------------------------------------------------------------------------------------------------------ elements

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  fill(node, attributes);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(node, attributes);
  node.append(...children);
  return node;
}

function fill(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
}

const byId = (id) => document.getElementById(id);
const note = (text) => el("p", { class: "note" }, text);

// --------------------------------------------------------------------------------------------------------- words

const MINUS = "\u2212";

function words(value, digits = 7) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Inf" : MINUS + "Inf";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en").replace("-", MINUS);
  const text = size < 1e-4 || size >= 1e7 ? value.toExponential(digits - 3) : String(+value.toPrecision(digits));
  return text.replace("-", MINUS).replace("e" + MINUS, "e-");
}

function tickWords(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(0).replace("e+", "e");
  return String(+value.toPrecision(6)).replace("-", MINUS);
}

const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

// --------------------------------------------------------------------------------------------------------- scales

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(1, most);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + 1e-9 * unit; i++)
    found.push(+(i * unit).toPrecision(12));
  return found;
}

function logTicks(low, high, most) {
  const a = Math.floor(Math.log10(low));
  const b = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((b - a) / most));
  const digits = b - a <= 2 ? [1, 2, 5] : [1];
  const found = [];
  for (let e = a; e <= b; e += every) for (const d of digits) found.push(+(d * 10 ** e).toPrecision(6));
  return found.filter((t) => t >= low * 0.999 && t <= high * 1.001);
}

// A function from data to pixels, with the ends it covers.
function scale(low, high, from, to, log = false) {
  const f = log ? Math.log10 : (v) => v;
  const a = f(low);
  const width = f(high) - a || 1;
  const place = (v) => from + ((f(v) - a) / width) * (to - from);
  place.inverse = (pixel) => {
    const t = a + ((pixel - from) / (to - from)) * width;
    return log ? 10 ** t : t;
  };
  return Object.assign(place, { low, high, log });
}

// -------------------------------------------------------------------------------------------------------- colours

const CIVIDIS = [
  "#00224e",
  "#013271",
  "#2f426d",
  "#48526c",
  "#5e636f",
  "#727374",
  "#878478",
  "#9d9576",
  "#b6a96f",
  "#cebc63",
  "#e7d150",
  "#fee838",
];
const DIVERGING = [
  "#053061",
  "#2065ab",
  "#4393c3",
  "#90c4dd",
  "#d1e5f0",
  "#f7f6f6",
  "#fddbc7",
  "#f3a481",
  "#d6604d",
  "#b1182b",
  "#67001f",
];
const VIRIDIS = [
  "#440154",
  "#482576",
  "#404588",
  "#34618d",
  "#297a8e",
  "#20928c",
  "#25ac82",
  "#4cc26c",
  "#86d549",
  "#cae11f",
];

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

// The colour at t in [0, 1]; what lies outside is drawn as the nearer end.
function colourAt(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [channels(stops[i]), channels(stops[i + 1])];
  return a.map((v, k) => Math.round(v + (place - i) * (b[k] - v)));
}

const rgb = (c) => `rgb(${c.join(",")})`;
const isDark = (c) => 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] < 135;
const gradient = (stops) => `linear-gradient(to right, ${stops.join(", ")})`;
const darkPage = () => matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;

const runColour = (i) => `var(--run-${i % DATA.colours})`;
const runDash = (i) => DATA.dashes[Math.floor(i / DATA.colours) % DATA.dashes.length];

// From dark to bright in the order of the layers; the end that the page's background would swallow is left out.
function layerColour(layer, n) {
  const t = n > 1 ? layer / (n - 1) : 0;
  return rgb(colourAt(VIRIDIS, darkPage() ? 0.25 + 0.75 * t : 0.88 * t));
}

function swatch(i) {
  const line = svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, "stroke-width": 3, "stroke-dasharray": runDash(i) });
  line.style.stroke = runColour(i);
  return svg("svg", { class: "swatch", width: 22, height: 10, "aria-hidden": "true" }, line);
}

function runName(i) {
  const name = [swatch(i), el("span", { class: "name" }, DATA.runs[i].label)];
  return DATA.runs[i].lost ? [...name, el("span", { class: "status lost" }, "lost")] : name;
}

// ------------------------------------------------------------------------------------------------------- tooltip

const tip = el("div", { class: "tip", role: "status", "aria-live": "polite", hidden: "" });

// Rows are strings, or [swatch or null, name, value].
function showTip(rows, x, y) {
  tip.replaceChildren(
    ...rows.map((row) => {
      if (typeof row === "string") return el("div", { class: "head" }, row);
      return el("div", { class: "row" }, row[0] || "", el("span", {}, row[1]), el("b", {}, row[2]));
    }),
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = x + 16 + box.width > innerWidth ? x - box.width - 12 : x + 16;
  tip.style.left = `${Math.max(6, Math.min(left, innerWidth - box.width - 6))}px`;
  tip.style.top = `${Math.max(6, Math.min(y + 14, innerHeight - box.height - 6))}px`;
}

const hideTip = () => {
  tip.hidden = true;
};

// A short line in this colour, for the rows of the tooltip.
function mark(colour, dash = "") {
  const line = svg("line", { x1: 0, x2: 14, y1: 5, y2: 5, "stroke-width": 3, "stroke-dasharray": dash });
  line.style.stroke = colour;
  return svg("svg", { width: 14, height: 10, "aria-hidden": "true" }, line);
}

// Counts of NaN and Inf: layers downwards, records from left to right, the first bad place marked.

const LEVELS = [1e-4, 1e-3, 1e-2, 1e-1, 1];
const COLUMN = 10; // pixels of a record at most: what lies between two records was not counted, and stays blank

// Layers downwards, records from left to right, coloured by the share of elements that are bad at one site.
// spec: steps, nLayer, share(record, layer), tell(record, layer), first {step, layer, name} or null, label.
function timeline(host, spec) {
  const width = Math.max(240, host.clientWidth);
  const row = Math.min(16, Math.max(5, 190 / spec.nLayer));
  const bottom = 30 + row * spec.nLayer;
  const height = bottom + 34;
  const n = spec.steps.length;
  const [low, high] = n > 1 ? [spec.steps[0], spec.steps[n - 1]] : [spec.steps[0] - 0.5, spec.steps[0] + 0.5];
  const x = scale(low, high, SVG_PAD.left, width - SVG_PAD.right - 4);
  const columns = Array.from({ length: n }, (_, i) => recordEnds(spec.steps, x, i));
  const root = svg("svg", {
    class: "chart",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    tabindex: 0,
    role: "img",
    "aria-label": `${spec.label}. Arrow keys read the counts.`,
  });
  const clean = columns.map(([left, right]) => box(left, 30, right, bottom - 30)).join("");
  root.append(svg("path", { class: "clean", d: clean }));
  root.append(...badPaths(spec, columns, row));
  for (let l = 0; l < spec.nLayer; l += Math.ceil(12 / row)) {
    root.append(svg("text", { x: SVG_PAD.left - 8, y: 30 + row * (l + 0.5) + 3.5, "text-anchor": "end" }, String(l)));
  }
  for (const t of ticks(low, high, width / 90).filter(Number.isInteger))
    root.append(svg("text", { x: x(t), y: bottom + 15, "text-anchor": "middle" }, tickWords(t)));
  root.append(svg("text", { class: "title", x: 0, y: 11 }, "Layer (0 = input)"));
  root.append(
    svg("text", { class: "title", x: width - SVG_PAD.right, y: height - 4, "text-anchor": "end" }, "training step"),
  );
  if (spec.first) root.append(...firstBad(spec, x, row, width, bottom));
  const cell = svg("rect", { class: "pick", visibility: "hidden", height: row });
  root.append(cell);
  readCells(root, cell, spec, columns, x, row);
  host.replaceChildren(root);
}

// Left and right end of record i: around its step, and no further than half way to its neighbours.
function recordEnds(steps, x, i) {
  const at = x(steps[i]);
  const left = i > 0 ? (at - x(steps[i - 1])) / 2 : COLUMN;
  const right = i + 1 < steps.length ? (x(steps[i + 1]) - at) / 2 : COLUMN;
  return [at - Math.min(left, COLUMN / 2), at + Math.min(right, COLUMN / 2)];
}

// One path a shade instead of one element a cell.
function badPaths(spec, columns, row) {
  const paths = LEVELS.map(() => "");
  for (let i = 0; i < spec.steps.length; i++) {
    for (let l = 0; l < spec.nLayer; l++) {
      const share = spec.share(i, l);
      if (!(share > 0)) continue;
      const level = LEVELS.findIndex((top) => share <= top);
      paths[level < 0 ? LEVELS.length - 1 : level] += box(columns[i][0], 30 + row * l, columns[i][1], row);
    }
  }
  return paths.map((d, k) => svg("path", { class: `bad bad-${k}`, d }));
}

const box = (left, top, right, height) =>
  `M${left.toFixed(1)},${top.toFixed(1)}H${right.toFixed(1)}v${height.toFixed(1)}H${left.toFixed(1)}z`;

function firstBad(spec, x, row, width, bottom) {
  const at = Math.min(Math.max(spec.first.step, x.low), x.high);
  const right = x(at) > width / 2;
  const parts = [
    svg("line", { class: "first", x1: x(at), x2: x(at), y1: 20, y2: bottom }),
    svg(
      "text",
      { class: "first", x: x(at) + (right ? -5 : 5), y: 24, "text-anchor": right ? "end" : "start" },
      spec.first.name,
    ),
  ];
  if (spec.first.layer !== null)
    parts.push(
      svg("circle", { class: "first", cx: x(at), cy: 30 + row * (spec.first.layer + 0.5), r: Math.max(4, row / 2) }),
    );
  return parts;
}

function readCells(root, cell, spec, columns, x, row) {
  let [i, l] = [0, 0];
  const show = (clientX, clientY) => {
    const [left, right] = columns[i];
    fill(cell, { x: left, y: 30 + row * l, width: Math.max(2, right - left), visibility: "visible" });
    showTip(spec.tell(i, l), clientX, clientY);
  };
  const clamp = (v, n) => Math.min(Math.max(v, 0), n - 1);
  const hide = () => {
    hideTip();
    cell.setAttribute("visibility", "hidden");
  };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    i = nearest(spec.steps, x.inverse(event.clientX - box.left));
    l = clamp(Math.floor((event.clientY - box.top - 30) / row), spec.nLayer);
    show(event.clientX, event.clientY);
  });
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") hide();
    if (!move) return;
    event.preventDefault();
    [i, l] = [clamp(i + move[0], spec.steps.length), clamp(l + move[1], spec.nLayer)];
    const box = root.getBoundingClientRect();
    show(box.left + columns[i][0], box.top + 30 + row * (l + 1));
  });
}

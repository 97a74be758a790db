// Lines over steps, layers or positions, with a guide at the chosen step and values under pointer and arrow keys.

const SVG_PAD = { left: 46, right: 12, top: 22, bottom: 34 };

// spec: lines [{name, colour, dash, x, y, lost, lostAt, points, more(i)}], xName, yName, log, xLog, low, high, yTicks,
// refs [{y, name}], marks [{x, colour, name}], height, cursor, xWord, whole (ticks at whole numbers only), empty.
// Returns {cursor(step)}, which moves the line that stands at the chosen step.
function lineChart(host, spec) {
  const width = Math.max(240, host.clientWidth);
  const height = spec.height || 260;
  const ends = chartEnds(spec);
  if (!ends) {
    host.replaceChildren(note(spec.empty || "No finite value to draw."));
    return { cursor() {} };
  }
  const x = scale(ends.x0, ends.x1, SVG_PAD.left, width - SVG_PAD.right, spec.xLog);
  const y = scale(ends.y0, ends.y1, height - SVG_PAD.bottom, SVG_PAD.top, spec.log);
  const root = svg("svg", {
    class: "chart",
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    tabindex: 0,
    role: "img",
    "aria-label":
      `${spec.yName} against ${spec.xName}: ${spec.lines.map((l) => l.name).join(", ")}. ` +
      "Left and right arrow keys read the values.",
  });
  root.append(...axes(spec, x, y, width, height));
  for (const line of spec.lines) root.append(...drawLine(line, x, y));
  const cursor = svg("line", { class: "cursor", y1: SVG_PAD.top, y2: height - SVG_PAD.bottom, visibility: "hidden" });
  const reader = svg("line", { class: "reader", y1: SVG_PAD.top, y2: height - SVG_PAD.bottom, visibility: "hidden" });
  root.append(cursor, reader);
  readValues(root, reader, spec, x);
  host.replaceChildren(root);
  const move = (step) => moveLine(cursor, x, step);
  if (spec.cursor !== undefined) move(spec.cursor);
  return { cursor: move };
}

function moveLine(line, x, at) {
  const inside = at !== null && at >= x.low && at <= x.high;
  fill(line, { x1: inside ? x(at) : 0, x2: inside ? x(at) : 0, visibility: inside ? "visible" : "hidden" });
}

// The ends of both axes over everything drawable; null where nothing is.
function chartEnds(spec) {
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const line of spec.lines) {
    for (let i = 0; i < line.x.length; i++) {
      const value = line.y[i];
      if (spec.xLog && line.x[i] <= 0) continue;
      x0 = Math.min(x0, line.x[i]);
      x1 = Math.max(x1, line.x[i]);
      if (!Number.isFinite(value) || (spec.log && value <= 0)) continue;
      y0 = Math.min(y0, value);
      y1 = Math.max(y1, value);
    }
    if (Number.isFinite(line.lostAt)) x1 = Math.max(x1, line.lostAt);
  }
  if (y0 > y1 || x0 > x1) return null;
  const room = spec.log ? 1.06 : (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 0.5;
  const low = spec.low ?? (spec.log ? y0 / room : y0 - (y0 >= 0 && y0 - room < 0 ? y0 : room));
  const high = spec.high ?? (spec.log ? y1 * room : y1 + room);
  if (x0 === x1) return { x0: x0 - 0.5, x1: x1 + 0.5, y0: low, y1: high };
  return { x0, x1, y0: low, y1: high };
}

function axes(spec, x, y, width, height) {
  const parts = [];
  const bottom = height - SVG_PAD.bottom;
  const yTicks = spec.yTicks || (spec.log ? logTicks(y.low, y.high, 5) : ticks(y.low, y.high, height / 55));
  for (const t of yTicks) {
    parts.push(svg("line", { class: "grid", x1: SVG_PAD.left, x2: width - SVG_PAD.right, y1: y(t), y2: y(t) }));
    parts.push(svg("text", { x: SVG_PAD.left - 6, y: y(t) + 3.5, "text-anchor": "end" }, tickWords(t)));
  }
  const xTicks = spec.xLog
    ? logTicks(x.low, x.high, 5)
    : ticks(x.low, x.high, width / 90).filter((t) => !spec.whole || Number.isInteger(t));
  for (const t of xTicks) parts.push(svg("text", { x: x(t), y: bottom + 15, "text-anchor": "middle" }, tickWords(t)));
  parts.push(svg("line", { class: "axis", x1: SVG_PAD.left, x2: width - SVG_PAD.right, y1: bottom, y2: bottom }));
  parts.push(svg("text", { class: "title", x: 0, y: 11 }, spec.yName));
  parts.push(
    svg("text", { class: "title", x: width - SVG_PAD.right, y: height - 4, "text-anchor": "end" }, spec.xName),
  );
  for (const ref of spec.refs || []) {
    if (ref.y < y.low || ref.y > y.high) continue;
    parts.push(svg("line", { class: "ref", x1: SVG_PAD.left, x2: width - SVG_PAD.right, y1: y(ref.y), y2: y(ref.y) }));
    parts.push(
      svg("text", { class: "ref", x: width - SVG_PAD.right, y: y(ref.y) - 4, "text-anchor": "end" }, ref.name),
    );
  }
  for (const m of spec.marks || []) {
    if (m.x < x.low || m.x > x.high) continue;
    const triangle = svg("path", { class: "event", d: `M${x(m.x)},${bottom - 8}l4.5,8h-9z` }, svg("title", {}, m.name));
    triangle.style.fill = m.colour;
    parts.push(triangle);
  }
  return parts;
}

// A line breaks where a value is not finite; a value between two breaks is a dot. Where a run was lost there is a cross,
// as high as its last value.
function drawLine(line, x, y) {
  const parts = [];
  let path = "";
  let pen = 0;
  let last = null;
  for (let i = 0; i < line.x.length; i++) {
    const ok = Number.isFinite(line.y[i]) && !(y.log && line.y[i] <= 0) && !(x.log && line.x[i] <= 0);
    if (!ok) {
      if (pen === 1) parts.push(dot(line, ...last));
      pen = 0;
      continue;
    }
    last = [x(line.x[i]), y(line.y[i])];
    path += `${pen ? "L" : "M"}${last[0].toFixed(1)},${last[1].toFixed(1)}`;
    pen += 1;
  }
  if (pen === 1) parts.push(dot(line, ...last));
  const stroke = svg("path", { class: "line", d: path, "stroke-dasharray": line.dash || "", "data-line": line.name });
  stroke.style.stroke = line.colour;
  parts.unshift(stroke);
  if (line.points && line.x.length <= 64) parts.push(...dots(line, x, y));
  if (line.lost && last) parts.push(...cross(line, x, ...last));
  return parts;
}

function dots(line, x, y) {
  const shown = Array.from(line.x.keys()).filter((i) => Number.isFinite(line.y[i]) && !(y.log && line.y[i] <= 0));
  return shown.map((i) => dot(line, x(line.x[i]), y(line.y[i])));
}

function dot(line, cx, cy) {
  const node = svg("circle", { cx, cy, r: 2.5 });
  node.style.fill = line.colour;
  return node;
}

// At the step at which the run was lost, with dots from its last value; on that value where the step is unknown.
function cross(line, x, lastX, cy) {
  const known = Number.isFinite(line.lostAt);
  const cx = known ? x(line.lostAt) : lastX;
  const lead = svg("line", { class: "lead", x1: lastX, x2: cx, y1: cy, y2: cy });
  lead.style.stroke = line.colour;
  const text = known ? `lost at step ${words(line.lostAt)}` : "lost after this, its last value";
  const mark = svg(
    "path",
    { class: "lost", d: `M${cx - 5},${cy - 5}l10,10m0,-10l-10,10` },
    svg("title", {}, `${line.name}: ${text}`),
  );
  return [lead, mark];
}

// Hover and arrow keys: the value of every line at its own record nearest to the place.
function readValues(root, reader, spec, x) {
  const places = [...new Set(spec.lines.flatMap((line) => Array.from(line.x)))]
    .filter((v) => v >= x.low && v <= x.high)
    .sort((a, b) => a - b);
  let at = -1;
  const show = (index, clientX, clientY) => {
    at = Math.min(Math.max(index, 0), places.length - 1);
    moveLine(reader, x, places[at]);
    showTip(valueRows(spec, places[at]), clientX, clientY);
  };
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect();
    show(nearest(places, x.inverse(event.clientX - box.left)), event.clientX, event.clientY);
  });
  const hide = () => {
    hideTip();
    moveLine(reader, x, null);
  };
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
  root.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hide();
    if (move === undefined) return;
    event.preventDefault();
    const next = Number.isFinite(move) ? (at < 0 ? places.length - 1 : at + move) : move < 0 ? 0 : places.length - 1;
    const box = root.getBoundingClientRect();
    show(next, box.left + x(places[Math.min(Math.max(next, 0), places.length - 1)]), box.top + 20);
  });
}

function valueRows(spec, at) {
  const rows = [`${spec.xWord || spec.xName} ${words(at)}`];
  for (const line of spec.lines) {
    if (!line.x.length) continue;
    const i = nearest(line.x, at);
    const where = line.x[i] === at ? "" : ` (at ${words(line.x[i])})`;
    rows.push([mark(line.colour, line.dash), line.name, words(line.y[i]) + (line.more ? line.more(i) : "") + where]);
  }
  return rows.length > 26 ? [...rows.slice(0, 26), `and ${rows.length - 26} more`] : rows;
}

// How many heads lie in each quarter of the ceiling, at the chosen step and over the steps.

// Shares of all heads in the quarters of the ceiling, the last one closed, and of NaN: five numbers whose sum is 1.
function shares(values, i) {
  const n = new Array(DATA.ranges.length + 1).fill(0);
  if (!(RUNS[i].ceiling > 0)) return n.fill(NaN); // T = 1: a single key leaves no choice, and there is no level
  for (const value of values) {
    const place = Number.isNaN(value) ? n.length - 1 : Math.min(Math.floor(4 * level(value, i)), n.length - 2);
    n[Math.max(0, place)] += 1;
  }
  return n.map((v) => v / values.length);
}

function rangeSection() {
  let charts = [];
  const bars = () => {
    const rows = withEntropy()
      .map(rangeBar)
      .filter((row) => row);
    byId("ranges-bars").replaceChildren(
      ...(rows.length ? rows : [note("No entropy was recorded at or before this step.")]),
    );
  };
  const draw = () => {
    const found = withEntropy();
    const lines = found.map(overloadLine);
    const spec = {
      lines,
      xName: "training step",
      xWord: "step",
      yName: "overloaded heads (share of all)",
      low: 0,
      high: 1.04,
      yTicks: [0, 0.25, 0.5, 0.75, 1],
      height: 240,
      cursor: state.step,
    };
    byId("ranges-plot").hidden = !found.length;
    charts = found.length ? [lineChart(byId("ranges-plot"), spec)] : [];
    byId("ranges-key").replaceChildren(...rangeKey());
    bars();
  };
  return {
    draw,
    step: () => {
      guides(charts);
      bars();
    },
  };
}

const rangeColour = (k) => colourAt(CIVIDIS, (k + 0.5) / DATA.ranges.length);

function rangeKey() {
  const names = DATA.ranges.map((name, k) => {
    const box = el("span", { class: "box" });
    box.style.backgroundColor = rgb(rangeColour(k));
    return el("span", {}, box, k === DATA.ranges.length - 1 ? `${name} overloaded` : name);
  });
  return [...names, el("span", {}, el("span", { class: "box nan" }), "NaN")];
}

function rangeBar(i) {
  const at = recordAt(entropyOf(i).steps, state.step);
  if (at < 0) return null;
  const found = shares(record(entropyOf(i).values, at), i);
  const names = [...DATA.ranges, "NaN"];
  const parts = found.map((share, k) => rangePart(share, k, names[k]));
  const bar = el(
    "div",
    { class: "stack", role: "img", "aria-label": found.map((s, k) => `${names[k]}: ${percent(s, 1)}`).join(", ") },
    ...parts.filter((p) => p),
  );
  return el(
    "div",
    { class: "range", "data-range": i, "data-step": entropyOf(i).steps[at] },
    el("div", { class: "label" }, ...runName(i)),
    bar,
  );
}

function rangePart(share, k, name) {
  if (!(share > 0)) return null;
  const part = el(
    "span",
    { "data-share": share, "data-range-name": name, title: `${name}: ${percent(share, 1)}` },
    share >= 0.07 ? percent(share) : "",
  );
  part.style.flexGrow = share;
  if (k === DATA.ranges.length) part.className = "nan";
  else {
    part.style.backgroundColor = rgb(rangeColour(k));
    part.className = isDark(rangeColour(k)) ? "dark" : "bright";
  }
  return part;
}

function overloadLine(i) {
  const stored = entropyOf(i);
  const y = Float64Array.from(stored.steps, (_, k) => shares(record(stored.values, k), i)[DATA.ranges.length - 1]);
  return {
    name: RUNS[i].label,
    colour: runColour(i),
    dash: runDash(i),
    x: stored.steps,
    y,
    more: (k) => ` (${percent(y[k], 1)})`,
  };
}

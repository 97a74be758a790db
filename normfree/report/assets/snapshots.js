// Snapshots: entropy by query position, and how many keys a head spreads over.

function snapshotSection() {
  const body = byId("snapshot-body");
  if (!RUNS.some((run) => run.snapshots)) {
    body.replaceChildren(note("No run recorded a snapshot (entropy by query position, effective width)."));
    return { draw() {}, step() {} };
  }
  let drawn = "";
  // Which snapshots the chosen step asks for: there are few, and most moves of the slider change none of them.
  const chosen = () => state.shown.map((i) => Object.values(RUNS[i].snapshots || {}).map(snapshotAt)).join(";");
  const draw = () => {
    drawn = chosen();
    const found = state.shown.filter((i) => RUNS[i].snapshots);
    const panels = found.flatMap((i) => snapshotPanels(i));
    body.replaceChildren(...panels.map((p) => p.node));
    if (!panels.length) body.append(note("None of the runs shown recorded a snapshot."));
    panels.forEach((p) => p.draw());
  };
  const step = () => {
    if (chosen() !== drawn) draw();
  };
  return { draw, step };
}

function snapshotPanels(i) {
  const { position_entropy: positions, effective_width: width } = RUNS[i].snapshots;
  const panels = [];
  if (positions) panels.push(positionPanel(i, positions));
  if (width) panels.push(widthPanel(i, width, RUNS[i].snapshots.entropy_quantiles));
  return panels;
}

const snapshotAt = (stored) => Math.max(0, recordAt(stored.steps, state.step));
const snapshotWords = (stored, at) => `snapshot of step ${words(stored.steps[at])}, ${sourceWords[stored.source]}`;

function positionPanel(i, stored) {
  const at = snapshotAt(stored);
  const [, nLayer, n] = stored.values.shape;
  const x = Float64Array.from(stored.positions, (p) => p + 1);
  const values = record(stored.values, at);
  const lines = Array.from({ length: nLayer }, (_, l) => ({
    name: `layer ${l}`,
    colour: layerColour(l, nLayer),
    x,
    y: values.subarray(l * n, (l + 1) * n),
  }));
  lines.push({ name: "largest possible", colour: "var(--muted)", dash: "5 4", x, y: x.map(Math.log) });
  const plot = el("div", { class: "plot" });
  const node = el("figure", {}, el("figcaption", {}, ...runName(i)), el("small", {}, snapshotWords(stored, at)), plot);
  const spec = {
    lines,
    xName: "keys the query sees",
    yName: "mean entropy of the row (nats)",
    xLog: true,
    low: 0,
    height: 240,
  };
  return { node, draw: () => lineChart(plot, spec) };
}

function widthPanel(i, stored, quantiles) {
  const at = snapshotAt(stored);
  const [nLayer, nHead] = stored.values.shape.slice(1);
  const values = record(stored.values, at);
  const top = (RUNS[i].T + 1) / 2; // a row spread evenly over its i + 1 keys has exp(H) = i + 1: (T + 1)/2 on average
  const tell = (l, h) => [
    `layer ${l}, head ${h}`,
    [null, "effective width", `${words(values[l * nHead + h])} keys`],
    ...quantileRows(quantiles, l, h),
  ];
  const map = headMap(nLayer, nHead, `Effective width of ${RUNS[i].label} in keys`, tell);
  const look = (v) =>
    Number.isNaN(v)
      ? null
      : { colour: colourAt(CIVIDIS, Math.log(v) / Math.log(top)), text: v < 10 ? v.toFixed(1) : v.toFixed(0) };
  const about = `effective width in keys, of ${words(top)} on average at most \u00b7 ${snapshotWords(stored, at)}`;
  const node = el("figure", { class: "map" }, el("figcaption", {}, ...runName(i)), el("small", {}, about), map.node);
  return {
    node,
    draw: () => {
      map.update(values, look);
      map.fit(node.clientWidth);
    },
  };
}

function quantileRows(stored, l, h) {
  if (!stored) return [];
  const [nHead, n] = stored.values.shape.slice(2);
  const values = record(stored.values, snapshotAt(stored)).subarray((l * nHead + h) * n, (l * nHead + h + 1) * n);
  const names = ["1 %", "5 %", "25 %", "50 %", "75 %", "95 %", "99 %"];
  return ["quantiles over rows of H / ln(i + 1)", ...Array.from(values, (v, k) => [null, names[k], words(v, 4)])];
}

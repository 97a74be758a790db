// What is one number a layer: entropy by layer, the residual stream, every other statistic.

// Mean over the heads that are not NaN; NaN where none is left.
function layerMeans(values, nLayer, nHead) {
  const means = new Float64Array(values.length / nHead);
  for (let k = 0; k < means.length; k++) {
    let [sum, n] = [0, 0];
    for (let h = 0; h < nHead; h++) {
      const value = values[k * nHead + h];
      if (Number.isNaN(value)) continue;
      sum += value;
      n += 1;
    }
    means[k] = n ? sum / n : NaN;
  }
  means.shape = [values.length / nHead / nLayer, nLayer];
  return means;
}

function column(values, l) {
  const n = values.shape[1];
  return Float64Array.from({ length: values.shape[0] }, (_, i) => values[i * n + l]);
}

const whole = (n) => Float64Array.from({ length: n }, (_, i) => i);

// A profile over the layers at the chosen step, a line a run; and a panel a run with a line a layer over the steps.
// `get(i)` gives {steps, values (records, n_layer)} or nothing; `look()` {name, log, absent, profile(found), panel(i)},
// where the last two give what a specification has besides: ends of the axis, lines across.
function layerFigures(ids, get, look) {
  let charts = [];
  const profile = () => {
    const found = state.shown.filter(get);
    byId(ids.profile).hidden = !found.length;
    if (!found.length) return;
    const { name, log, profile: more } = look();
    const axis = { xName: "layer (0 = input)", xWord: "layer", whole: true, yName: name, log, height: 260 };
    const { factor = () => 1, ...rest } = more(found);
    const lines = found.map((i) => profileLine(i, get(i), factor(i))).filter((line) => line);
    lineChart(byId(ids.profile), { ...axis, ...rest, lines, empty: "No finite value at this step." });
  };
  const draw = () => {
    const found = state.shown.filter(get);
    const panels = found.map((i) =>
      el("figure", {}, el("figcaption", {}, ...runName(i)), el("div", { class: "plot" })),
    );
    byId(ids.panels).classList.toggle("many", state.shown.length > 4);
    byId(ids.panels).replaceChildren(...panels);
    const specs = found.map((i) => ({ ...panelSpec(get(i), look()), ...look().panel(i) }));
    const ends = chartEnds({ lines: specs.flatMap((spec) => spec.lines), log: look().log });
    charts = specs.map((spec, k) => lineChart(panels[k].lastChild, { low: ends?.y0, high: ends?.y1, ...spec }));
    byId(ids.notes).replaceChildren(...layerNotes(found, get, look().absent));
    byId(ids.key).replaceChildren(...(found.length ? [layerKey(Math.max(...found.map((i) => RUNS[i].n_layer)))] : []));
    byId(ids.legend).replaceChildren(...found.map((i) => el("span", {}, ...runName(i))));
    profile();
  };
  return {
    draw,
    step: () => {
      guides(charts);
      profile();
    },
  };
}

const figureIds = (prefix) =>
  Object.fromEntries(["profile", "panels", "notes", "key", "legend"].map((name) => [name, `${prefix}-${name}`]));

function layerNotes(found, get, absentWords) {
  const absent = state.shown.filter((i) => !get(i)).map((i) => RUNS[i].label);
  return [...(absent.length ? [note(`${absentWords}: ${absent.join(", ")}.`)] : []), ...recordNotes(found, get)];
}

function profileLine(i, stored, factor) {
  const at = recordAt(stored.steps, state.step);
  if (at < 0) return null;
  const y = Float64Array.from(record(stored.values, at), (v) => factor * v);
  const more = () => (stored.steps[at] === state.step ? "" : ` (step ${words(stored.steps[at])})`);
  return { name: RUNS[i].label, colour: runColour(i), dash: runDash(i), x: whole(y.length), y, points: true, more };
}

function panelSpec(stored, look) {
  const n = stored.values.shape[1];
  const alone = stored.steps.length === 1;
  const lines = Array.from({ length: n }, (_, l) => ({
    name: `layer ${l}`,
    colour: layerColour(l, n),
    x: stored.steps,
    y: column(stored.values, l),
    points: alone,
  }));
  return {
    lines,
    xName: "training step",
    xWord: "step",
    yName: look.name,
    log: look.log,
    height: 220,
    cursor: state.step,
  };
}

function layerKey(n) {
  const bar = el("span", { class: "ramp" });
  const stops = Array.from({ length: 9 }, (_, k) => layerColour(k, 9));
  bar.style.backgroundImage = gradient(stops);
  return el("span", {}, "layer 0", bar, `layer ${n - 1}`);
}

function entropyLayers() {
  const means = new Map(); // packed entropy -> its layer means, computed once
  const get = (i) => {
    const stored = entropyOf(i);
    if (!stored) return null;
    if (!means.has(stored))
      means.set(stored, {
        steps: stored.steps,
        of: stored.of,
        values: layerMeans(stored.values, stored.values.shape[1], stored.values.shape[2]),
      });
    return means.get(stored);
  };
  const look = () => ({
    name: "mean entropy (nats)",
    absent: `No entropy of the ${sourceWords[state.source]} was recorded in`,
    panel: (i) => entropyAxis(RUNS[i].ceiling),
    profile: (found) => entropyProfile(found),
  });
  return layerFigures(figureIds("layers"), get, look);
}

const entropyAxis = (ceiling) => ({
  low: 0,
  high: 1.08 * (ceiling || 1),
  refs: [
    { y: ceiling, name: `ceiling ${ceiling.toFixed(3)}` },
    { y: DATA.overloaded * ceiling, name: "overloaded" },
  ],
});

// Runs of different T have different ceilings: each is then drawn as a share of its own.
function entropyProfile(found) {
  const ceilings = new Set(found.map((i) => RUNS[i].ceiling));
  if (ceilings.size === 1) return entropyAxis([...ceilings][0]);
  const yName = "mean entropy (share of each run's own ceiling)";
  const refs = [
    { y: 1, name: "ceiling" },
    { y: DATA.overloaded, name: "overloaded" },
  ];
  return { factor: (i) => 1 / RUNS[i].ceiling, yName, low: 0, high: 1.08, refs };
}

// --------------------------------------------------------------------------- residual stream and other statistics

const STATISTICS = {
  resid_rms: ["RMS of the residual stream after each block", true],
  resid_max: ["largest magnitude of the residual stream", true],
  mlp_pre_std: ["standard deviation of the feed-forward pre-activations", true],
  grad_norm: ["gradient norm of each block", true],
  update_norm: ["norm of each block's update", true],
  max_score: ["largest attention score", false],
  sink_mass: ["attention probability on key 0", false],
  one_minus_max: ["mean of 1 \u2212 largest probability", false],
  overloaded: ["overloaded heads", false],
  collapsed: ["collapsed heads", false],
  act_slope: ["learned negative slope", false],
};
const RESIDUAL = ["resid_rms", "resid_max"];

function statisticSection(prefix, wanted, empty) {
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.layers)))].filter(wanted);
  const order = Object.keys(STATISTICS);
  names.sort((a, b) => (order.indexOf(a) + 1 || 99) - (order.indexOf(b) + 1 || 99) || a.localeCompare(b));
  const select = byId(`${prefix}-name`);
  select.append(...names.map((name) => el("option", { value: name }, (STATISTICS[name] || [name])[0])));
  if (!names.length) {
    byId(`${prefix}-body`).replaceChildren(note(empty));
    return { draw() {}, step() {} };
  }
  const log = byId(`${prefix}-log`);
  const usual = () => {
    log.checked = (STATISTICS[select.value] || ["", false])[1];
  };
  usual();
  const get = (i) => RUNS[i].layers[select.value];
  const nothing = () => ({});
  const look = () => ({
    name: statisticName(select.value),
    log: log.checked,
    absent: "Not recorded in",
    panel: nothing,
    profile: nothing,
  });
  const figures = layerFigures(figureIds(prefix), get, look);
  select.addEventListener("change", () => {
    usual();
    figures.draw();
  });
  log.addEventListener("change", figures.draw);
  return figures;
}

function statisticName(name) {
  const stored = RUNS.map((run) => run.layers[name]).find((s) => s);
  const how = stored.how ? `, ${stored.how} over heads` : "";
  const unit = stored.unit ? ` (${stored.unit})` : "";
  return (STATISTICS[name] || [name])[0] + how + unit;
}

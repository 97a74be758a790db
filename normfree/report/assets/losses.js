// Losses and every other curve of a run over its steps.

const UNITS = {
  "train/loss": "training loss (nats per token)",
  "val/loss": "validation loss (nats per token)",
  "val/perplexity": "validation perplexity",
  "val/bits_per_byte": "validation bits per byte",
  grad_norm: "gradient norm",
  lr: "learning rate",
  tokens_per_second: "tokens per second",
};

function lossSection() {
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.scalars)))];
  const order = Object.keys(UNITS);
  names.sort((a, b) => (order.indexOf(a) + 1 || 99) - (order.indexOf(b) + 1 || 99) || a.localeCompare(b));
  const select = byId("metric");
  select.append(...names.map((name) => el("option", { value: name }, UNITS[name] || name)));
  let charts = [];
  const draw = () => {
    const metric = select.value;
    const found = state.shown.filter((i) => RUNS[i].scalars[metric]);
    const lines = found.map((i) => scalarLine(i, metric));
    const marks = found.flatMap((i) => RUNS[i].events.map((e) => eventMark(i, e)));
    const spec = {
      lines,
      marks,
      xName: "training step",
      xWord: "step",
      yName: UNITS[metric] || metric,
      log: byId("loss-log").checked,
      height: 340,
      cursor: state.step,
    };
    spec.empty = state.shown.length ? "No run shown has a finite value of this." : "No run is chosen.";
    charts = [lineChart(byId("loss-plot"), spec)];
    byId("loss-legend").replaceChildren(...found.map((i) => el("span", {}, ...runName(i))));
    byId("loss-notes").replaceChildren(...scalarNotes(metric));
  };
  select.addEventListener("change", draw);
  byId("loss-log").addEventListener("change", draw);
  return { draw, step: () => guides(charts) };
}

function scalarLine(i, metric) {
  const curve = RUNS[i].scalars[metric];
  return {
    name: RUNS[i].label,
    colour: runColour(i),
    dash: runDash(i),
    x: curve.steps,
    y: curve.values,
    lost: RUNS[i].lost,
    lostAt: RUNS[i].lost_at,
    points: curve.steps.length < 24,
  };
}

function eventMark(i, event) {
  const layer = event.layer === null ? "" : `, layer ${event.layer}`;
  return {
    x: event.step,
    colour: runColour(i),
    name: `${RUNS[i].label}, step ${event.step}${layer}: ${event.kind} ${event.text}`,
  };
}

function scalarNotes(metric) {
  const curves = state.shown.map((i) => [RUNS[i].label, RUNS[i].scalars[metric]]);
  const absent = curves.filter(([, curve]) => !curve).map(([label]) => label);
  const thinned = curves.filter(([, curve]) => curve && curve.of > curve.steps.length);
  const notes = [];
  if (absent.length) notes.push(note(`Not recorded in: ${absent.join(", ")}.`));
  if (thinned.length) {
    const counts = thinned.map(([label, curve]) => `${label} (${plural(curve.of, "point")})`).join(", ");
    notes.push(note(`Drawn from the smallest and largest value of each stretch of the curve: ${counts}.`));
  }
  return notes;
}

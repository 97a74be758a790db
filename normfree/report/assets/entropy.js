// The entropy of every head of every run, and the difference of two runs.

const level = (value, i) => value / RUNS[i].ceiling;

function headWords(values, i) {
  let [over, nan] = [0, 0];
  for (const value of values) {
    if (Number.isNaN(value)) nan += 1;
    else if (level(value, i) >= DATA.overloaded) over += 1;
  }
  const missing = nan ? `, ${nan} NaN` : "";
  return `${percent(over / values.length)} overloaded (${over} of ${values.length})${missing}`;
}

function headRows(i, l, h, value, step) {
  const rows = [
    `${RUNS[i].label}, step ${words(step)}`,
    [null, "layer", String(l)],
    [null, "head", String(h)],
    [null, "entropy", Number.isNaN(value) ? "NaN" : `${words(value)} nats`],
  ];
  if (!Number.isNaN(value) && RUNS[i].ceiling > 0) rows.push([null, "of the ceiling", percent(level(value, i), 1)]);
  if (level(value, i) >= DATA.overloaded) rows.push("overloaded");
  return rows;
}

function heatSection() {
  let maps = [];
  const draw = () => {
    const host = byId("heat-plots");
    host.classList.toggle("many", state.shown.length > 4);
    maps = state.shown.map(heatPanel);
    host.replaceChildren(...maps.map((m) => m.node));
    if (!maps.length) host.append(note("No run is chosen."));
    maps.forEach((m) => m.fit && m.fit(m.node.clientWidth));
    byId("heat-scale").replaceChildren(...(withEntropy().length ? [entropyScale()] : []));
    byId("heat-notes").replaceChildren(...recordNotes(withEntropy(), (i) => entropyOf(i)));
    step();
  };
  const step = () => maps.forEach((m) => m.step());
  return { draw, step };
}

function recordNotes(indices, of) {
  const thinned = indices.filter((i) => of(i).of > of(i).steps.length);
  if (!thinned.length) return [];
  const counts = thinned.map((i) => `${RUNS[i].label} (${of(i).steps.length} of ${of(i).of})`);
  return [note(`Not every record is in the page: ${counts.join(", ")}.`)];
}

// Nats where all runs shown have one ceiling, else shares of each run's own.
function entropyScale() {
  const ceilings = [...new Set(withEntropy().map((i) => RUNS[i].ceiling))];
  const one = ceilings.length === 1;
  const number = (share) => (one ? (share * ceilings[0]).toFixed(share ? 2 : 0) : percent(share));
  const names = { 0: "one key", 0.75: "overloaded", 1: "ceiling" };
  const title = one
    ? `Entropy in nats; the ceiling ln(T!)/T is ${ceilings[0].toFixed(3)} at T = ${RUNS[withEntropy()[0]].T}`
    : "Share of each run's own ceiling ln(T!)/T: the runs differ in T";
  return colourBar(
    CIVIDIS,
    [0, 0.25, 0.5, 0.75, 1].map((s) => [s, number(s), names[s] || ""]),
    title,
  );
}

function heatPanel(i) {
  const run = RUNS[i];
  const stored = entropyOf(i);
  const title = el("figcaption", {}, ...runName(i));
  const about = el("small", {});
  if (!stored) {
    const text = `No entropy of the ${sourceWords[state.source]} was recorded.`;
    return { node: el("figure", { class: "map", "data-panel": i }, title, note(text)), step() {} };
  }
  const [nLayer, nHead] = stored.values.shape.slice(1);
  let at = -1;
  const value = (l, h) => record(stored.values, at)[l * nHead + h];
  const map = headMap(nLayer, nHead, `Attention entropy of ${run.label} in nats, layers by heads`, (l, h) =>
    headRows(i, l, h, at < 0 ? NaN : value(l, h), stored.steps[at]),
  );
  const look = (v) =>
    Number.isNaN(v) ? null : { colour: colourAt(CIVIDIS, run.ceiling > 0 ? level(v, i) : 0), text: v.toFixed(2) };
  const later = note("");
  const node = el("figure", { class: "map", "data-panel": i }, title, about, map.node, later);
  const step = () => {
    at = recordAt(stored.steps, state.step);
    map.node.hidden = at < 0;
    later.hidden = at >= 0;
    later.textContent = at < 0 ? `The first record of this run is of step ${words(stored.steps[0])}.` : "";
    about.textContent = "";
    if (at < 0) return;
    node.dataset.step = stored.steps[at];
    about.textContent = `step ${words(stored.steps[at])} \u00b7 ${headWords(record(stored.values, at), i)}`;
    map.update(record(stored.values, at), look);
  };
  return { node, step, fit: map.fit };
}

// ------------------------------------------------------------------------------------------------------ difference

function differenceSection() {
  const [first, second] = [byId("diff-a"), byId("diff-b")];
  for (const select of [first, second]) select.append(...RUNS.map((run, i) => el("option", { value: i }, run.label)));
  second.value = String(Math.min(1, RUNS.length - 1));
  let step = () => {};
  const draw = () => {
    const host = byId("diff-plot");
    const [a, b] = [+first.value, +second.value];
    const why = noDifference(a, b);
    step = () => {};
    byId("diff-scale").replaceChildren();
    if (why) return host.replaceChildren(note(why));
    step = differenceMap(host, a, b);
    return step();
  };
  first.addEventListener("change", draw);
  second.addEventListener("change", draw);
  return { draw, step: () => step() };
}

function noDifference(a, b) {
  if (RUNS.length < 2) return "A difference needs two runs; this report has one.";
  if (a === b) return "Choose two different runs.";
  for (const i of [a, b])
    if (!entropyOf(i)) return `${RUNS[i].label} has no recorded entropy of the ${sourceWords[state.source]}.`;
  if (RUNS[a].T !== RUNS[b].T) {
    const lengths = [a, b].map((i) => `${RUNS[i].label} has T = ${RUNS[i].T}`);
    return `No difference: entropies of different sequence lengths are not comparable. ${lengths.join(", ")}.`;
  }
  const shapes = [a, b].map((i) => entropyOf(i).values.shape.slice(1).join(" \u00d7 "));
  if (shapes[0] !== shapes[1])
    return `No difference: ${RUNS[a].label} has ${shapes[0]} layers \u00d7 heads, ${RUNS[b].label} ${shapes[1]}.`;
  if (!commonSteps(a, b).length) return "No difference: the two runs have no record of the same step.";
  return null;
}

function commonSteps(a, b) {
  const other = new Set(entropyOf(b).steps);
  return Array.from(entropyOf(a).steps).filter((s) => other.has(s));
}

const differenceAt = (a, b, step) => {
  const [x, y] = [a, b].map((i) => record(entropyOf(i).values, recordAt(entropyOf(i).steps, step)));
  return Array.from(x, (v, k) => y[k] - v);
};

// Second minus first, on one scale for all steps so that moving the slider does not change what a colour means.
function differenceMap(host, a, b) {
  const steps = commonSteps(a, b);
  let top = 0;
  for (const s of steps) for (const v of differenceAt(a, b, s)) if (Math.abs(v) > top) top = Math.abs(v);
  top = top || 1;
  const [nLayer, nHead] = entropyOf(a).values.shape.slice(1);
  let [values, at] = [[], 0];
  const name = `${RUNS[b].label} minus ${RUNS[a].label}`;
  const map = headMap(nLayer, nHead, `Difference of attention entropy in nats: ${name}`, (l, h) =>
    differenceRows(a, b, l, h, at, values[l * nHead + h]),
  );
  const look = (v) => (Number.isNaN(v) ? null : { colour: colourAt(DIVERGING, 0.5 + v / (2 * top)), text: signed(v) });
  const about = el("small", {});
  const node = el("figure", { class: "map", id: "diff-map" }, el("figcaption", {}, name), about, map.node);
  host.replaceChildren(node);
  map.fit(node.clientWidth);
  const labels = [-1, -0.5, 0, 0.5, 1].map((t) => [
    0.5 + t / 2,
    words(+(t * top).toFixed(2)),
    t === 0 ? "equal" : t === -1 ? "less spread" : t === 1 ? "more spread" : "",
  ]);
  byId("diff-scale").replaceChildren(colourBar(DIVERGING, labels, "Difference in nats; one scale for all steps"));
  return () => {
    const i = recordAt(steps, state.step);
    map.node.hidden = i < 0;
    about.textContent = i < 0 ? `The first step both have is ${words(steps[0])}.` : "";
    if (i < 0) return;
    at = steps[i];
    node.dataset.step = at;
    values = differenceAt(a, b, at);
    about.textContent = differenceWords(values, at);
    map.update(values, look);
  };
}

// Two digits with a proper minus sign; what rounds to zero has none.
const signed = (v) => (Math.abs(v) < 0.005 ? "0.00" : v.toFixed(2).replace("-", MINUS));

function differenceWords(values, step) {
  const kept = values.filter((v) => !Number.isNaN(v));
  const text = step === state.step ? `step ${words(step)}` : `step ${words(step)}, the newest that both have`;
  if (!kept.length) return `${text} \u00b7 every head is NaN in one of the two`;
  const mean = kept.reduce((a, v) => a + v, 0) / kept.length;
  const nan = values.length - kept.length;
  const higher = `higher in ${kept.filter((v) => v > 0).length} of ${kept.length} heads`;
  const missing = nan ? `, ${nan} NaN in one of the two` : "";
  return `${text} \u00b7 mean ${words(+mean.toFixed(3))} nats \u00b7 ${higher}${missing}`;
}

function differenceRows(a, b, l, h, step, difference) {
  const nHead = entropyOf(a).values.shape[2];
  const value = (i) => record(entropyOf(i).values, recordAt(entropyOf(i).steps, step))[l * nHead + h];
  return [
    `layer ${l}, head ${h}, step ${words(step)}`,
    ...[b, a].map((i) => [mark(runColour(i), runDash(i)), RUNS[i].label, words(value(i))]),
    [null, "difference, nats", words(difference)],
  ];
}

// NaN and Inf over the steps, with the first bad place of each run.

const SITES = {
  block: "block output",
  attn: "attention output",
  mlp: "feed-forward output",
  attn_probs: "attention probabilities",
  q: "queries",
  k: "keys",
  v: "values",
  mlp_hidden: "feed-forward hidden layer",
};
const KINDS = { both: "NaN or Inf", nan: "NaN", inf: "Inf" };
const ANY = "any";
const siteWords = (site) => (site === ANY ? "anywhere in the layer" : SITES[site] || site);

function faultSection() {
  const sites = [...new Set(RUNS.flatMap((run) => (run.counts ? run.counts.sites : [])))];
  byId("fault-site").append(...[ANY, ...sites].map((site) => el("option", { value: site }, siteWords(site))));
  const draw = () => {
    const [kind, site] = [byId("fault-kind").value, byId("fault-site").value];
    const host = byId("fault-plots");
    const clean = [];
    host.replaceChildren();
    for (const i of state.shown) {
      if (RUNS[i].counts && isBad(RUNS[i])) faultPanel(host, i, kind, site);
      else clean.push(el("li", {}, ...runName(i), el("span", { class: "quiet" }, cleanWords(RUNS[i]))));
    }
    byId("fault-clean").replaceChildren(...clean);
    byId("fault-controls").hidden = !host.children.length;
  };
  byId("fault-kind").addEventListener("change", draw);
  byId("fault-site").addEventListener("change", draw);
  return { draw, step() {} };
}

const isBad = (run) => Object.keys(run.first).length > 0 || run.fault !== null;

function cleanWords(run) {
  const c = run.counts;
  if (!c) return ": NaN and Inf were not counted.";
  const range =
    c.steps.length > 1
      ? `steps ${words(c.steps[0])} to ${words(c.steps[c.steps.length - 1])}`
      : `step ${words(c.steps[0])}`;
  const where = `${plural(c.nan.shape[2], "layer")}, ${range}, ${sourceWords[c.source]}`;
  return `: no NaN and no Inf in ${plural(c.of, "record")} (${where}).`;
}

// A run's counts by record, site and layer: the `share` of the chosen kind for the colour, `tell` for the tooltip.
function countReader(counts, kind) {
  const [, nSite, nLayer] = counts.nan.shape;
  const read = (name, k, s, l) => (counts[name] ? counts[name][(k * nSite + s) * nLayer + l] : 0);
  const at = (k, s, l) => (kind === "both" ? read("nan", k, s, l) + read("inf", k, s, l) : read(kind, k, s, l));
  const elements = (k, s) => (counts.elements ? counts.elements[k * nSite + s] : NaN);
  // Without its denominator a count gets the palest shade: seen, but of unknown share.
  const share = (k, s, l) => (at(k, s, l) > 0 ? Math.min(1, at(k, s, l) / elements(k, s)) || 1e-9 : 0);
  const tell = (k, s, l) => {
    const found = [
      ["nan", "NaN"],
      ["inf", "Inf"],
    ].filter(([name]) => read(name, k, s, l) > 0);
    if (!found.length) return "none";
    const of = elements(k, s) > 0 ? ` of ${words(elements(k, s))}` : "";
    return found.map(([name, word]) => `${words(read(name, k, s, l))} ${word}`).join(", ") + of;
  };
  return { share, tell };
}

function faultPanel(host, i, kind, site) {
  const run = RUNS[i];
  const counts = run.counts;
  const plot = el("div", { class: "plot" });
  const about = el("small", { class: "first-words" }, firstWords(run, kind));
  host.append(el("figure", { "data-timeline": i }, el("figcaption", {}, ...runName(i)), about, plot));
  const chosen = counts.sites.map((_, s) => s).filter((s) => site === ANY || counts.sites[s] === site);
  if (!chosen.length || (kind !== "both" && !counts[kind])) {
    plot.append(note(`${KINDS[kind]} was not counted there.`));
    return;
  }
  const nLayer = counts.nan.shape[2];
  const reader = countReader(counts, kind);
  const share = (k, l) => Math.max(...chosen.map((s) => reader.share(k, s, l)));
  const rows = (k, l) => counts.sites.map((name, s) => [null, siteWords(name), reader.tell(k, s, l)]);
  const tell = (k, l) => [`step ${words(counts.steps[k])}, layer ${l}`, ...rows(k, l)];
  const label = `${KINDS[kind]} of ${run.label}, ${siteWords(site)}`;
  timeline(plot, { steps: counts.steps, nLayer, share, tell, first: firstPlace(run, kind), label });
}

// The traced fault knows the module and the exact step; the counts know the first record that shows it.
function firstPlace(run, kind) {
  if (run.fault) {
    const name = `first bad: ${run.fault.module || "unknown module"}, step ${words(run.fault.step)}`;
    return { step: run.fault.step, layer: run.fault.layer, name };
  }
  const place = run.first[kind];
  return place
    ? { step: place.step, layer: place.layer, name: `first: layer ${place.layer}, step ${words(place.step)}` }
    : null;
}

function firstWords(run, kind) {
  const place = run.first[kind];
  const traced = run.fault ? `${tracedWords(run.fault)} ` : "";
  if (!place) return `${traced}No ${KINDS[kind]} in any record.`;
  const where = `step ${words(place.step)}, layer ${place.layer}, ${siteWords(place.site)}`;
  return `${traced}First record with ${KINDS[kind]}: ${where} (${plural(place.count, "element")}).`;
}

function tracedWords(fault) {
  if (fault.text) return fault.text;
  const where = fault.module || "an unknown module";
  return `${fault.value || "A non-finite value"} in ${where} at step ${words(fault.step)}.`;
}

// The page: which runs, source and step are chosen, and the sections that follow them.

const RUNS = DATA.runs;
const state = { shown: RUNS.map((_, i) => i), source: "probe", steps: [], step: 0 };
const sections = []; // each {draw(), step()}: all of it anew, or only what depends on the chosen step

const entropyOf = (i) => RUNS[i].entropy[state.source];
const withEntropy = () => state.shown.filter((i) => entropyOf(i));
const sourceWords = { probe: "validation probe", train: "training batch" };

// ------------------------------------------------------------------------------------------------ runs, source, step

function chooseRuns() {
  const boxes = [...document.querySelectorAll("#picker input[type=checkbox]")];
  state.shown = boxes.filter((box) => box.checked).map((box) => +box.value);
  byId("picked").textContent = `${state.shown.length} of ${RUNS.length}`;
  for (const node of document.querySelectorAll("[data-run]")) node.hidden = !state.shown.includes(+node.dataset.run);
  newSteps();
}

function chooseSource() {
  state.source = document.querySelector("input[name=source]:checked").value;
  newSteps();
}

// The union of the records' steps of the runs and the source chosen; the slider stays where it was, as near as it can.
function newSteps() {
  const before = state.steps.length ? state.step : Infinity;
  state.steps = [...new Set(withEntropy().flatMap((i) => Array.from(entropyOf(i).steps)))].sort((a, b) => a - b);
  const slider = byId("step");
  slider.max = Math.max(0, state.steps.length - 1);
  slider.disabled = byId("play").disabled = state.steps.length < 2;
  slider.value = state.steps.length ? nearest(state.steps, before) : 0;
  readSlider();
  drawAll();
}

function readSlider() {
  const none = !state.steps.length;
  state.step = none ? Infinity : state.steps[+byId("step").value];
  const text = none ? "no records" : `step ${words(state.step)}`;
  byId("step").setAttribute("aria-valuetext", text);
  byId("step-value").textContent = text;
}

let pending = 0;
function moveStep() {
  readSlider();
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => sections.forEach((section) => section.step()));
}

function drawAll() {
  hideTip();
  sections.forEach((section) => section.draw());
}

let playing = null;
function play() {
  const slider = byId("step");
  const stop = () => {
    clearInterval(playing);
    playing = null;
    byId("play").setAttribute("aria-pressed", "false");
  };
  if (playing) return stop();
  if (+slider.value >= +slider.max) slider.value = 0;
  byId("play").setAttribute("aria-pressed", "true");
  playing = setInterval(() => {
    slider.value = +slider.value + 1;
    moveStep();
    if (+slider.value >= +slider.max) stop();
  }, 160);
}

// The guides of all figures over steps stand at the chosen step.
function guides(charts) {
  charts.forEach((chart) => chart.cursor(state.step));
}

// ----------------------------------------------------------------------------------------------------------- start

function startSource() {
  for (const radio of document.querySelectorAll("input[name=source]")) {
    const runs = RUNS.filter((run) => run.entropy[radio.value]).length;
    radio.disabled = !runs;
    radio.addEventListener("change", chooseSource);
  }
  if (!RUNS.some((run) => run.entropy.probe)) state.source = "train";
  for (const radio of document.querySelectorAll("input[name=source]")) radio.checked = radio.value === state.source;
}

function startControls() {
  for (const box of document.querySelectorAll("#picker input[type=checkbox]"))
    box.addEventListener("change", chooseRuns);
  for (const button of document.querySelectorAll("#picker button")) {
    button.addEventListener("click", () => {
      for (const box of document.querySelectorAll("#picker input[type=checkbox]")) box.checked = button.value === "all";
      chooseRuns();
    });
  }
  document.addEventListener("click", (event) => {
    if (!byId("picker").contains(event.target)) byId("picker").open = false;
  });
  byId("step").addEventListener("input", moveStep);
  byId("play").addEventListener("click", play);
  byId("play").hidden = matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function redrawWhenSeenAnew() {
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  matchMedia("print").addEventListener("change", drawAll);
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    byId("problem").textContent =
      "This browser is too old to unpack the figures (it has no DecompressionStream). The tables are complete.";
    return;
  }
  await unpackAll(DATA.runs);
  document.body.append(tip);
  startSource();
  startControls();
  sections.push(lossSection(), heatSection(), differenceSection(), entropyLayers(), rangeSection(), faultSection());
  sections.push(
    statisticSection(
      "resid",
      (name) => RESIDUAL.includes(name),
      "No run recorded the size of the residual stream (resid_rms, resid_max among diagnostics.statistics).",
    ),
  );
  sections.push(
    statisticSection("stat", (name) => !RESIDUAL.includes(name), "No run recorded another statistic by layer."),
  );
  sections.push(snapshotSection());
  newSteps();
  redrawWhenSeenAnew();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("problem").textContent = `The figures could not be drawn (${error}). The tables are complete.`;
  throw error;
});

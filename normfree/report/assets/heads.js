// A map of heads, and the colour bar beside it.

// A table of layers x heads, each cell a colour and a number. `tell(layer, head)` gives the rows of its tooltip.
// Returns {node, update(values, look)}, where look(value) is {colour: [r, g, b], text} or null for what has none (NaN).
function headMap(nLayer, nHead, label, tell) {
  const heads = Array.from({ length: nHead }, (_, h) => el("th", { scope: "col" }, String(h)));
  const cells = [];
  const rows = Array.from({ length: nLayer }, (_, l) => {
    const row = Array.from({ length: nHead }, (_, h) => el("td", { "data-layer": l, "data-head": h, tabindex: -1 }));
    cells.push(...row);
    return el("tr", {}, el("th", { scope: "row" }, String(l)), ...row);
  });
  cells[0].tabIndex = 0;
  const corner = el("td", { class: "corner" });
  const table = el(
    "table",
    { class: "heat", "aria-label": label },
    el("thead", {}, el("tr", {}, corner, ...heads)),
    el("tbody", {}, ...rows),
  );
  cellEvents(table, cells, nHead, tell);
  const update = (values, look) => cells.forEach((cell, i) => paint(cell, values[i], look));
  const fit = (width) => {
    const cell = (width - 24) / nHead;
    table.style.setProperty("--cell", `${Math.min(30, Math.max(9, 0.62 * cell))}px`);
    table.classList.toggle("numbers", cell >= 30);
    table.classList.toggle("tight", cell < 14);
  };
  return { node: table, update, fit };
}

function paint(cell, value, look) {
  const seen = look(value);
  cell.dataset.value = String(value);
  cell.className = seen ? (isDark(seen.colour) ? "dark" : "bright") : "nan";
  cell.style.backgroundColor = seen ? rgb(seen.colour) : "";
  cell.textContent = seen ? seen.text : "NaN";
}

function cellEvents(table, cells, nHead, tell) {
  const show = (cell, x, y) => showTip(tell(+cell.dataset.layer, +cell.dataset.head), x, y);
  table.addEventListener("pointermove", (event) => {
    const cell = event.target.closest("td[data-layer]");
    if (cell) show(cell, event.clientX, event.clientY);
    else hideTip();
  });
  table.addEventListener("pointerleave", hideTip);
  table.addEventListener("focusout", hideTip);
  table.addEventListener("focusin", (event) => {
    const box = event.target.getBoundingClientRect();
    show(event.target, box.right, box.bottom);
  });
  table.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -nHead, ArrowDown: nHead }[event.key];
    const from = cells.indexOf(event.target);
    if (event.key === "Escape") hideTip();
    if (move === undefined || from < 0 || !cells[from + move]) return;
    event.preventDefault();
    cells[from].tabIndex = -1;
    cells[from + move].tabIndex = 0;
    cells[from + move].focus();
  });
}

// A colour bar: labels at places in [0, 1], [place, number, word].
function colourBar(stops, labels, title) {
  const bar = el("div", { class: "bar" });
  bar.style.backgroundImage = gradient(stops);
  const marks = labels.map(([place, number, word]) => {
    const node = el(
      "span",
      { class: word === "overloaded" ? "mark over" : "mark" },
      el("b", {}, number),
      el("i", {}, word),
    );
    node.style.left = `${100 * place}%`;
    return node;
  });
  return el(
    "div",
    { class: "scale" },
    el("div", { class: "what" }, title),
    bar,
    el("div", { class: "marks" }, ...marks),
  );
}

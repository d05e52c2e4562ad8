"use strict";
// Without a script the page is whole; with it, tables sort, figures say their values, and more.
function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
}
function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") {
    // What is no number comes last.
    return Number.isNaN(one) - Number.isNaN(other) || one - other || 0;
  }
  return String(one).localeCompare(String(other), undefined, { numeric: true });
}
function sortBy(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const falling = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach((head) => head.setAttribute("aria-sort", "none"));
  heads[column].setAttribute("aria-sort", falling ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => (falling ? -1 : 1) * compare(value(a, column), value(b, column)));
  table.tBodies[0].append(...rows);
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sortBy(table, column));
  });
}
for (const input of document.querySelectorAll("label.filter input")) {
  const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    rows.forEach((row) => { row.hidden = !row.textContent.toLowerCase().includes(wanted); });
  });
}
// Figures say their values, by mouse or by arrow keys, and hide what is pressed in the legend.
function hide(figure, series, hidden) {
  const parts = `[id*="-series-${series}-"], .values [data-series="${series}"]`;
  figure.querySelectorAll(parts).forEach((one) => { one.style.display = hidden ? "none" : ""; });
  figure.querySelectorAll(`[id*="-legend-${series}-"]`).forEach((one) => {
    one.style.opacity = hidden ? 0.3 : 1;
    if (one.hasAttribute("tabindex")) one.setAttribute("aria-pressed", String(!hidden));
  });
}
function legendOf(figure) {
  const hidden = new Set(), named = new Set();
  const names = JSON.parse(figure.querySelector("svg").dataset.series);
  for (const one of figure.querySelectorAll('[id*="-legend-"]')) {
    const series = one.id.match(/-legend-(\d+)-/)[1];
    const press = () => {
      if (!hidden.delete(series)) hidden.add(series);
      hide(figure, series, hidden.has(series));
    };
    one.classList.add("switch");
    one.addEventListener("click", press);
    if (named.has(series)) continue;
    named.add(series);
    const about = { tabindex: 0, role: "button", "aria-pressed": "true",
      "aria-label": names[series] };
    Object.entries(about).forEach(([name, text]) => one.setAttribute(name, text));
    one.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      press();
    });
  }
}
function valuesOf(figure) {
  const output = figure.querySelector("output");
  const circles = [...figure.querySelectorAll(".values circle")];
  let place = -1;
  const say = (circle) => {
    circles.forEach((one) => one.classList.toggle("told", one === circle));
    output.textContent = circle ? circle.textContent : "";
  };
  circles.forEach((one, n) => one.addEventListener("pointerenter", () => { place = n; say(one); }));
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.target !== figure) return;
    const shown = circles.filter((one) => one.style.display !== "none");
    if (!shown.length) return;
    event.preventDefault();
    const at = shown.indexOf(circles[place]);
    const next = shown[(Math.max(at, step < 0 ? 0 : -1) + step + shown.length) % shown.length];
    place = circles.indexOf(next);
    say(next);
  });
}
for (const figure of document.querySelectorAll(".figure")) {
  legendOf(figure);
  valuesOf(figure);
}
// Tokens of neuron cards, by circuitsvis where the page has it, in runs of one modality.
function runsOf(prompt) {
  const runs = [];
  for (const span of prompt.querySelectorAll("span[data-x]")) {
    const { kind, x } = span.dataset, peak = span.classList.contains("peak");
    let run = runs.at(-1);
    if (!run || run.kind !== kind || run.peak || peak) {
      run = { kind, peak, colour: span.style.borderColor, tokens: [], values: [] };
      runs.push(run);
    }
    // It would read tokens as HTML. A word joiner is not seen, and ends what looks like a tag.
    run.tokens.push(span.textContent.replace(/[<&]/g, "$&\u2060"));
    run.values.push(Number(x));
  }
  return runs;
}
function drawTokens(prompt, number) {
  const most = Number(prompt.dataset.most) || 1;
  const drawn = runsOf(prompt).map((run, place) => {
    const span = document.createElement("span");
    span.id = `tokens-${number}-${place}`;
    span.className = run.peak ? "run peak" : "run";
    span.dataset.kind = run.kind;
    span.style.borderColor = run.colour;
    return [span, run];
  });
  prompt.replaceChildren(...drawn.map(([span]) => span));
  for (const [span, { tokens, values, colour }] of drawn) {
    CircuitsVis.render(span.id, CircuitsVis.ColoredTokens, { tokens, values, minValue: -most,
      maxValue: most, negativeColor: "white", positiveColor: colour });
  }
}
if (typeof CircuitsVis !== "undefined") {
  document.querySelectorAll(".prompt[data-most]").forEach(drawTokens);
}

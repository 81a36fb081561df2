"use strict";
// Draws the curves of each <figure class="curves"> with uPlot. The picture in it stays for readers
// without scripts, for print and for papers.

const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shown = (number, digits = 3) => number.toLocaleString("en", { maximumSignificantDigits: digits });
const place = (number) => number.toLocaleString("en", { maximumFractionDigits: number < 100 ? 3 : 0 });
// Black lines must be seen on a dark page too.
const colour = (line) => (line.colour === "#000000" ? token("--ink") : line.colour);
const size = (home) => ({ width: home.clientWidth, height: home.clientWidth > 700 ? 420 : 320 });
const charts = [];

// Of each line the columns low, high, raw and value, all on the places that any line has.
function align(lines) {
  const columns = ["low", "high", "raw", "value"];
  return uPlot.join(lines.map((line) => [line.x, ...columns.map((name) => line[name] ?? line.x.map(() => null))]));
}

// Series 4, 8, ... of a chart are its lines' values; those of single seeds follow at the end.
const isValue = (panel, i) => i % 4 === 0 && i <= 4 * panel.lines.length;

function draw(home, panel, curves) {
  const series = [{}], bands = [], seeds = [];
  for (const line of panel.lines) {
    const at = series.length, stroke = () => colour(line);
    const edge = { stroke: () => colour(line) + "88", width: 0.7, points: { show: false } };
    series.push({ ...edge }, { ...edge });
    series.push({ stroke: () => colour(line) + "55", width: 1, points: { show: false } });
    series.push({ stroke, width: 2.2, dash: line.dash, points: { show: false } });
    if (line.low) bands.push({ series: [at + 1, at], fill: () => colour(line) + "26" });
  }
  const data = align(panel.lines);
  for (const line of panel.lines) {
    for (const values of line.seeds ?? []) {
      seeds.push([line.x, values]);
      series.push({ stroke: () => colour(line) + "77", width: 0.8, points: { show: false }, of: line });
    }
  }
  const joined = seeds.length ? uPlot.join([data, ...seeds]) : data;
  const axis = () => ({
    stroke: () => token("--ink"),
    grid: { stroke: () => token("--line"), width: 1 },
    ticks: { stroke: () => token("--line"), width: 1 },
    values: (_, values) => values.map((value) => value.toLocaleString("en")),
  });
  const legend = document.createElement("div");
  legend.className = "legend";
  const chart = new uPlot(
    {
      ...size(home),
      legend: { show: false },
      cursor: {
        points: { show: (u, i) => (isValue(panel, i) ? document.createElement("div") : null) },
      },
      scales: { x: { time: false }, y: curves.limits ? { range: curves.limits } : {} },
      axes: [
        { ...axis(), label: curves.x, space: 70 },
        { ...axis(), label: curves.y, size: 64 },
      ],
      series,
      bands,
      hooks: { setCursor: [(u) => say(u, panel, legend)] },
    },
    joined,
    home,
  );
  panel.lines.forEach((line, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    const swatch = document.createElement("i");
    swatch.style.setProperty("--swatch", line.colour === "#000000" ? "var(--ink)" : line.colour);
    swatch.className = line.dash ? "dashed" : "";
    const said = document.createElement("output");
    button.append(swatch, line.name, said);
    button.addEventListener("click", () => {
      const show = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(show));
      chart.batch(() => {
        for (let i = 1; i <= 4; i++) chart.setSeries(4 * index + i, { show });
        chart.series.forEach((own, i) => own.of === line && chart.setSeries(i, { show }));
      });
    });
    legend.append(button);
  });
  const where = document.createElement("span");
  where.className = "where";
  legend.append(where);
  home.append(legend);
  say(chart, panel, legend);
  new ResizeObserver(() => chart.setSize(size(home))).observe(home);
  charts.push(chart);
}

// Writes the values under the cursor into the legend; a line has none beyond its own ends.
function say(u, panel, legend) {
  const outside = u.cursor.left == null || u.cursor.left < 0;
  const x = outside ? NaN : u.posToVal(u.cursor.left, "x");
  const [...said] = legend.querySelectorAll("output");
  panel.lines.forEach((line, index) => {
    const at = u.cursor.idxs?.[4 * (index + 1)];
    const margin = (line.x.at(-1) - line.x[0]) / 100;
    if (outside || at == null || x < line.x[0] - margin || x > line.x.at(-1) + margin) {
      said[index].textContent = "";
      return;
    }
    const [low, high, raw, value] = [1, 2, 3, 4].map((i) => u.data[4 * index + i][at]);
    let text = shown(value);
    if (low != null) text += ` ± ${shown((high - low) / 2, 2)}`;
    if (raw != null) text += ` (raw ${shown(raw)})`;
    said[index].textContent = text;
  });
  const where = legend.querySelector(".where");
  if (where) where.textContent = outside ? "" : `at ${place(x)}`;
}

for (const figure of document.querySelectorAll("figure.curves")) {
  const curves = JSON.parse(figure.querySelector("script").textContent);
  const home = figure.querySelector(".panels");
  figure.classList.add("drawn");
  for (const panel of curves.panels) {
    const box = document.createElement("div");
    box.className = "panel";
    if (panel.title) {
      const title = document.createElement("h3");
      title.textContent = panel.title;
      box.append(title);
    }
    home.append(box);
    draw(box, panel, curves);
  }
  const link = figure.querySelector("a[download]");
  link.href = figure.querySelector("img").src;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((u) => u.redraw(false)));

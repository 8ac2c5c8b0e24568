// One figure: a canvas chart that draws what its sources hold, thinned to the pixels there are.

import uPlot from "../vendor/uPlot.js";
import { fresh, h, put, say } from "./dom.js";
import { number } from "./format.js";
import { newest, rangeOf, short } from "./scale.js";
import { align, lowerBound, thin } from "./thin.js";

const HEIGHT = 210;
const DASHES = [undefined, [7, 4], [2, 3], [10, 3, 2, 3]];
const NUM_COLORS = 8;
export const STRIP_COLORS = { ess: 1, cap: 2, fixed: 3, warmup: 4, noise: 5, schedule: 6, kl_budget: 7, bias_variance: 8 };

/** A custom property of the style sheet, as it is in the present light. */
export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/**
 * `getLines()` returns `[{label, table, name, color?}]`. `draw()` brings the picture up to date; while the
 * chart is out of sight it only remembers to.
 */
export class Chart {
  #plot = null;
  #key = "";
  #range = null;
  #visible = false;
  #stale = true;
  #lines = [];

  constructor(figure, getLines, syncKey = "steps") {
    this.figure = figure;
    this.getLines = getLines;
    this.syncKey = syncKey;
    const heading = fresh("figure");
    this.stage = h("div.stage", { tabindex: 0, role: "img", "aria-label": `${figure.title}: nothing yet`, onkeydown: (event) => this.#onKey(event), ondblclick: () => this.#zoom(null) });
    this.readout = h("p.unseen", { "aria-live": "polite" });
    this.body = h("tbody");
    this.head = h("tr");
    this.strip = h("p.quiet.strip");
    this.details = h("details.numbers", { ontoggle: () => this.#fillTable() }, h("summary", {}, "Numbers"),
      h("div.scroll", { tabindex: 0, role: "group", "aria-label": `${figure.title}: numbers` }, h("table", {}, h("thead", {}, this.head), this.body)));
    this.node = h("figure", { "aria-labelledby": heading },
      h("h3", { id: heading }, figure.title, figure.unit ? h("span.unit", {}, ` ${figure.unit}`) : ""),
      this.stage, this.readout, this.strip, figure.note ? h("figcaption", {}, figure.note) : "", this.details);
    this.watcher = new IntersectionObserver((entries) => {
      this.#visible = entries.at(-1).isIntersecting;
      if (this.#visible && this.#stale) this.draw();
    }, { rootMargin: "400px" });
    this.watcher.observe(this.node);
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.stage);
  }

  /** Whether there is anything to draw. */
  get isEmpty() {
    return this.getLines().every((line) => !line.table.column(line.name));
  }

  draw() {
    this.#stale = !this.#visible;
    this.#lines = this.getLines().filter((line) => line.table.column(line.name));
    if (!this.#lines.length) return;
    this.stage.setAttribute("aria-label", this.#summary());
    const width = this.stage.clientWidth;
    if (this.#stale || !width) return;
    const [from, to] = this.#range ?? [];
    const data = align(this.#lines.map((line) => thin(line.table.steps, line.table.column(line.name), width, from, to)));
    const key = JSON.stringify([this.#lines.map((line) => [line.label, line.name]), width]);
    if (key !== this.#key) this.#build(key, width, data);
    else this.#plot.setData(data);
    this.stage.dataset.points = data[0].length; // for whoever looks from outside: tests
    if (!this.#plot.cursor.left || this.#plot.cursor.left < 0) this.#plot.setLegend({ idx: data[0].length - 1 }, false);
    this.#sayStrip();
    if (this.details.open) this.#fillTable();
  }

  /** Build again, for colours that changed. */
  restyle() {
    this.#key = "";
    this.draw();
  }

  /** Draw even out of sight: for print. */
  drawNow() {
    this.#visible = true;
    this.draw();
  }

  destroy() {
    this.watcher.disconnect();
    this.sizes.disconnect();
    this.#plot?.destroy();
    this.#plot = null;
  }

  #build(key, width, data) {
    this.#plot?.destroy();
    this.#key = key;
    const [muted, grid] = ["muted", "grid"].map(color);
    const font = '12px system-ui, "DejaVu Sans", sans-serif';
    const axis = { stroke: muted, font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
    const { range } = this.figure;
    this.#plot = new uPlot({
      width,
      height: HEIGHT,
      scales: { x: { time: false }, y: { range: range ?? ((_, low, high) => rangeOf(low, high)) } },
      axes: [{ ...axis, size: 32 }, { ...axis, size: 58, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) }],
      series: [{ label: "step" }, ...this.#lines.map((line, i) => this.#series(line, i))],
      cursor: { sync: { key: this.syncKey }, drag: { setScale: false, x: true, y: false }, points: { size: 7 } },
      legend: { live: true },
      hooks: {
        drawClear: [(plot) => this.#drawBand(plot)],
        draw: [(plot) => this.#drawStrip(plot)],
        setSelect: [(plot) => this.#onSelect(plot)],
      },
    }, data, this.stage);
    this.#plot.root.querySelector(".u-legend").setAttribute("aria-hidden", "true"); // the label says the same
  }

  #series(line, i) {
    const stroke = line.color ?? color(`series-${(i % NUM_COLORS) + 1}`);
    const sparse = sparsity(line) > 2;
    return {
      label: line.label,
      stroke,
      width: line.name === this.figure.bold ? 3 : 1.6,
      dash: DASHES[Math.floor(i / NUM_COLORS) % DASHES.length] ?? line.dash,
      spanGaps: true,
      points: { show: sparse ? undefined : false, size: 5 },
      value: (plot, _, series, index) => number(newest(plot.data[series], index)),
    };
  }

  #drawBand(plot) {
    if (!this.figure.band) return;
    const [low, high] = this.figure.band.map((value) => plot.valToPos(value, "y", true));
    plot.ctx.fillStyle = color("band");
    plot.ctx.fillRect(plot.bbox.left, high, plot.bbox.width, low - high);
  }

  /** What bound γ, along the bottom: one colour per reason. */
  #drawStrip(plot) {
    const source = this.figure.strip && this.#lines[0]?.table;
    const texts = source?.text(this.figure.strip);
    if (!texts) return;
    const { left, top, width, height } = plot.bbox;
    const depth = 5 * devicePixelRatio;
    const steps = source.steps;
    for (let x = 0; x < width; x += 2) {
      const text = texts[Math.min(lowerBound(steps, plot.posToVal((left + x) / devicePixelRatio - plot.over.offsetLeft, "x")), steps.length - 1)];
      if (!text || text === "none") continue;
      plot.ctx.fillStyle = color(`series-${STRIP_COLORS[text] ?? 8}`);
      plot.ctx.fillRect(left + x, top + height - depth, 2, depth);
    }
  }

  #sayStrip() {
    const source = this.figure.strip && this.#lines[0]?.table;
    const texts = source?.text(this.figure.strip);
    if (!texts) return;
    const counts = new Map();
    for (const text of texts) if (text && text !== "none") counts.set(text, (counts.get(text) ?? 0) + 1);
    if (!counts.size) return;
    const total = [...counts.values()].reduce((a, b) => a + b, 0);
    put(this.strip, "Bound by ", ...[...counts].sort((a, b) => b[1] - a[1]).map(([text, count]) =>
      h("span.key", {}, h(`span.swatch.s${STRIP_COLORS[text] ?? 8}`), `${text} ${Math.round((100 * count) / total)} %`)));
  }

  #onSelect(plot) {
    if (plot.select.width < 4) return;
    const range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.#zoom(range);
  }

  #zoom(range) {
    this.#range = range;
    this.draw();
  }

  /** Arrow keys move along the steps and read them out; Escape shows the whole run again. */
  #onKey(event) {
    const plot = this.#plot;
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.#zoom(null);
    if (!plot || move === undefined) return;
    event.preventDefault();
    const count = plot.data[0].length;
    const at = Math.min(Math.max((plot.cursor.idx ?? count - 1) + move, 0), count - 1);
    plot.setCursor({ left: plot.valToPos(plot.data[0][at], "x"), top: 10 });
    const step = plot.data[0][at];
    const values = this.#lines.map((line) => `${line.label} ${number(line.table.at(line.name, lowerBound(line.table.steps, step)))}`);
    say(this.readout, `Step ${step}: ${values.join(", ")}`);
  }

  #summary() {
    const parts = this.#lines.map((line) => `${line.label} ${number(line.table.first(line.name))} → ${number(line.table.last(line.name))}`);
    return `${this.figure.title}. First and newest value: ${parts.join("; ")}. Arrow keys read single steps.`;
  }

  #fillTable() {
    if (!this.details.open || !this.#lines.length) return;
    const shown = align(this.#lines.map((line) => thin(line.table.steps, line.table.column(line.name), 12)));
    put(this.head, h("th", { scope: "col" }, "Step"), ...this.#lines.map((line) => h("th.n", { scope: "col" }, line.label)));
    put(this.body, ...shown[0].map((step, i) => h("tr", {}, h("th", { scope: "row" }, String(step)),
      ...this.#lines.map((_, j) => h("td.n", {}, shown[j + 1][i] === undefined ? "" : number(shown[j + 1][i]))))));
  }
}

/** Redraw in other colours when the system turns light or dark. Returns a function that stops watching. */
export function onThemeChange(redraw) {
  const query = matchMedia("(prefers-color-scheme: dark)");
  query.addEventListener("change", redraw);
  return () => query.removeEventListener("change", redraw);
}

/** Rows per value: above 2 the points are drawn too, for a line between evaluations hides where they were. */
function sparsity(line) {
  const values = line.table.column(line.name);
  let known = 0;
  for (const value of values) known += Number.isNaN(value) ? 0 : 1;
  return known < 3 || known > 200 ? (known < 3 ? Infinity : 1) : values.length / known;
}

// All figures of one job, or of several over each other; a figure appears when its first value does.

import { Chart } from "./chart.js";
import { h, put, say } from "./dom.js";
import { FIGURES, figureOf, linesOf, otherNames } from "./figures.js";
import { absent } from "./notice.js";

/** `getSources()` returns `[{label, table, color?}]`; a label stands before a curve's own where there are several. */
export class Gallery {
  #charts = new Map();
  #picked = [];
  #names = "";

  constructor(getSources, figures = FIGURES) {
    this.getSources = getSources;
    this.figures = figures;
    this.grid = h("div.figures");
    this.missing = absent("");
    this.picker = h("select", { id: "more-figures", onchange: (event) => this.#pick(event.target) });
    this.more = h("p.more", { hidden: true }, h("label", { for: "more-figures" }, "Another figure "), this.picker);
    this.node = h("div", {}, this.grid, this.missing, this.more);
    addEventListener("beforeprint", this.#print);
  }

  /** `isOver`: no more figures will come. */
  draw(isOver = false) {
    const names = [...new Set(this.getSources().flatMap((source) => source.table.names))];
    for (const figure of [...this.figures, ...this.#picked]) {
      const hasLines = linesOf(figure, names).length > 0;
      if (hasLines && !this.#charts.has(figure.id)) this.#add(figure);
    }
    for (const chart of this.#charts.values()) chart.draw();
    const key = names.join();
    if (key !== this.#names) this.#offer(names);
    this.#names = key;
    say(this.missing, this.#whatIsMissing(names, isOver));
  }

  restyle() {
    for (const chart of this.#charts.values()) chart.restyle();
  }

  destroy() {
    removeEventListener("beforeprint", this.#print);
    for (const chart of this.#charts.values()) chart.destroy();
  }

  #print = () => {
    for (const chart of this.#charts.values()) chart.drawNow();
  };

  #add(figure) {
    const chart = new Chart(figure, () => this.#lines(figure));
    this.#charts.set(figure.id, chart);
    const order = [...this.figures, ...this.#picked].map((each) => each.id);
    const later = order.slice(order.indexOf(figure.id) + 1).find((id) => this.#charts.has(id));
    this.grid.insertBefore(chart.node, later ? this.#charts.get(later).node : null);
  }

  #lines(figure) {
    const sources = this.getSources();
    return sources.flatMap(({ label, table, color }) =>
      linesOf(figure, table.names).map((line, i) => ({
        ...line,
        table,
        label: label === null ? line.label : figure.lines.length === 1 ? label : `${label}: ${line.label}`,
        color: label === null ? undefined : color,
        dash: label === null || i === 0 ? undefined : [4, 3],
      })));
  }

  #offer(names) {
    const others = otherNames(names).filter((name) => !this.#picked.some((figure) => figure.title === name));
    this.more.hidden = others.length === 0;
    put(this.picker, h("option", { value: "" }, `choose one of ${others.length}`), ...others.map((name) => h("option", { value: name }, name)));
  }

  #pick(select) {
    if (!select.value) return;
    this.#picked.push(figureOf(select.value));
    this.#names = "";
    this.draw();
  }

  #whatIsMissing(names, isOver) {
    if (!names.length) return isOver ? "None: the job ended before its first evaluation or step." : "No figures yet: they come with the first evaluation or step.";
    const titles = this.figures.filter((figure) => !linesOf(figure, names).length).map((figure) => figure.title);
    return titles.length ? `Not measured by this job${isOver ? "" : ", or not yet"}: ${titles.join("; ")}.` : "";
  }
}

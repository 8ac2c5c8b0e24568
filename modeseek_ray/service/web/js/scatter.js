// Retention against new-task success: each job's path through its evaluations, and which ends nothing beats.

import { color } from "./chart.js";
import { h, s } from "./dom.js";
import { number, percent } from "./format.js";

const WIDEST = 640;
const SAME = 5e-4; // what no table here would show as a difference, half a tenth of a per cent

/**
 * `{x, y}` of one job's evaluations, both larger = better, and what they are. Accuracies where both are
 * measured, else losses with their sign turned; null where the job measures only one side.
 */
export function pathOf(table) {
  for (const [measure, sign] of [["accuracy", 1], ["nll", -1]]) {
    const [x, y] = [`validation.${measure}`, `retention.${measure}`].map((name) => table.column(name));
    if (!x || !y) continue;
    const points = [];
    for (let i = 0; i < table.length; i += 1) {
      if (!Number.isNaN(x[i]) && !Number.isNaN(y[i])) points.push({ step: table.steps[i], x: sign * x[i], y: sign * y[i] });
    }
    if (points.length) return { measure, points };
  }
  return null;
}

/** True for the points no other beats: as good on both axes, and better on one. */
export function paretoFront(points) {
  return points.map((a) => !points.some((b) => b.x > a.x - SAME && b.y > a.y - SAME && (b.x > a.x + SAME || b.y > a.y + SAME)));
}

/** Drawn in the pixels there are, so that letters keep their size on a phone. */
function sizeFor(room) {
  const width = Math.min(room || WIDEST, WIDEST);
  return { width, height: Math.max(0.625 * width, 260), left: 52, right: 26, top: 26, bottom: 40 };
}

/** `jobs`: `[{label, points}]`, drawn in the order of the palette; `room`: pixels from side to side. */
export function scatter(jobs, measure, room) {
  const size = sizeFor(room);
  const ends = jobs.map((job) => job.points.at(-1));
  const front = paretoFront(ends);
  const all = jobs.flatMap((job) => job.points);
  const x = axis(all.map((point) => point.x), size.left, size.width - size.right, measure);
  const y = axis(all.map((point) => point.y), size.height - size.bottom, size.top, measure);
  const show = measure === "accuracy" ? percent : (value) => number(-value);
  const mark = measure === "accuracy" ? (value) => `${Math.round(100 * value)} %` : show;
  const what = measure === "accuracy" ? "share solved" : "loss, better upwards and to the right";
  const svg = s("svg", { viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": `New task against old tasks, ${what}. The table below has the numbers.` },
    ...x.ticks.flatMap((tick) => [s("line.grid", { x1: x.at(tick), x2: x.at(tick), y1: size.top, y2: size.height - size.bottom }),
      s("text.tick", { x: x.at(tick), y: size.height - size.bottom + 16, "text-anchor": "middle" }, mark(tick))]),
    ...y.ticks.flatMap((tick) => [s("line.grid", { x1: size.left, x2: size.width - size.right, y1: y.at(tick), y2: y.at(tick) }),
      s("text.tick", { x: size.left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, mark(tick))]),
    s("text.tick", { x: size.width - size.right, y: size.height - 6, "text-anchor": "end" }, `new task, ${measure === "accuracy" ? "solved" : "loss"} →`),
    s("text.tick", { x: 4, y: 12 }, `↑ old tasks, ${measure === "accuracy" ? "solved" : "loss"}`),
    ...jobs.map((job, i) => jobPath(job, i, x, y, front[i], show, size)));
  return [h("figure.scatter", {}, svg, h("figcaption", {}, "Lines lead from the first evaluation to the last. Ringed ends are on the Pareto front: no other job here is better on both.")),
    table(jobs, ends, front, show)];
}

function jobPath(job, i, x, y, isFront, show, size) {
  const stroke = color(`series-${(i % 8) + 1}`);
  const end = job.points.at(-1);
  const [cx, cy] = [x.at(end.x), y.at(end.y)];
  const isRight = cx > size.width * 0.7;
  return s("g", { stroke, fill: stroke },
    s("polyline", { points: job.points.map((point) => `${x.at(point.x)},${y.at(point.y)}`).join(" "), fill: "none", "stroke-width": 1.6, opacity: 0.7 }),
    ...job.points.slice(0, -1).map((point) => s("circle", { cx: x.at(point.x), cy: y.at(point.y), r: 2.5, stroke: "none" },
      s("title", {}, `${job.label}, step ${point.step}: new ${show(point.x)}, old ${show(point.y)}`))),
    isFront ? s("circle", { cx, cy, r: 10, fill: "none", "stroke-width": 1.6 }) : "",
    s("circle", { cx, cy, r: 5.5, stroke: "none" }, s("title", {}, `${job.label}: new ${show(end.x)}, old ${show(end.y)}`)),
    s("text.name", { x: cx + (isRight ? -14 : 14), y: cy + 4 + (i % 2 ? 12 : -4), "text-anchor": isRight ? "end" : "start", stroke: "none" }, job.label));
}

function table(jobs, ends, front, show) {
  return h("div.scroll", { tabindex: 0, role: "group", "aria-label": "The jobs compared" }, h("table", {},
    h("thead", {}, h("tr", {}, ...["Job", "New task, first → last", "Old tasks, first → last", "Step", "Pareto front"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...jobs.map((job, i) => h("tr", {},
      h("th", { scope: "row" }, h(`span.swatch.s${(i % 8) + 1}`), " ", h("a", { href: `#/jobs/${encodeURIComponent(job.id)}` }, job.label)),
      h("td", {}, `${show(job.points[0].x)} → ${show(ends[i].x)}`), h("td", {}, `${show(job.points[0].y)} → ${show(ends[i].y)}`),
      h("td.n", {}, String(ends[i].step)), h("td", {}, front[i] ? "yes" : "no"))))));
}

/** A linear axis over the values, with some round ticks. */
function axis(values, from, to, measure) {
  let [low, high] = measure === "accuracy" ? [0, 1] : [Math.min(...values), Math.max(...values)];
  if (high - low < 1e-9) [low, high] = [low - 0.5, high + 0.5];
  const step = niceStep((high - low) / 5);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i += 1) ticks.push(i * step);
  return { ticks, at: (value) => Math.round((from + ((value - low) / (high - low)) * (to - from)) * 10) / 10 };
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((factor) => factor * power >= rough - 1e-12) * power;
}

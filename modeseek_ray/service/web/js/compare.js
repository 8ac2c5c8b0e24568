// Several jobs over each other: what was learnt against what was kept, and their curves.

import { listJobs } from "./api.js";
import { color, onThemeChange } from "./chart.js";
import { h, put } from "./dom.js";
import { Feed } from "./feed.js";
import { FIGURES } from "./figures.js";
import { state, title } from "./format.js";
import { Gallery } from "./gallery.js";
import { absent, notice } from "./notice.js";
import { pathOf, scatter } from "./scatter.js";

const MOST_JOBS = 8;
const COMPARED = { loss: ["loss"], ess: ["ess_ratio"], retention: ["retention.accuracy"], success: ["validation.accuracy"],
  "evaluation-loss": ["validation.nll", "retention.nll"], kl: ["retention.kl_nats"], gamma: ["gamma"], speed: ["tokens_per_s"] };

/** The figures that are worth laying over each other, with one or two lines a job. */
const FIGURES_COMPARED = FIGURES.filter((figure) => COMPARED[figure.id]).map((figure) => ({
  ...figure,
  strip: undefined,
  bold: undefined,
  note: figure.strip ? "" : figure.note,
  title: figure.title.replace(", per old task", "").replace(", and what bound it", ""),
  lines: figure.lines.slice(0, COMPARED[figure.id].length),
}));

export function compareView(place, list) {
  const ids = [...new Set(list.split(",").filter(Boolean))].slice(0, MOST_JOBS);
  document.title = "Compare · modeseek";
  const chooser = h("div");
  const pareto = h("div");
  const problem = h("div");
  const gallery = new Gallery(sources, FIGURES_COMPARED);
  put(place, h("h1", {}, "Compare jobs"), problem, chooser);
  drawChooser(ids, chooser).catch((error) => put(problem, notice(error)));
  if (!ids.length) return () => gallery.destroy();
  place.append(h("section", { "aria-labelledby": "pareto" }, h("h2", { id: "pareto" }, "Learnt against kept"), pareto),
    h("section", { "aria-labelledby": "curves" }, h("h2", { id: "curves" }, "Curves"), gallery.node));
  const feeds = ids.map((id) => new Feed(id, draw));
  for (const feed of feeds) feed.start().catch((error) => problem.append(notice(error, feed.jobId)));
  const unwatch = onThemeChange(() => (gallery.restyle(), draw()));
  return () => {
    for (const feed of feeds) feed.stop();
    unwatch();
    gallery.destroy();
  };

  function sources() {
    return feeds.map((feed, i) => ({ label: feed.job ? labelOf(feed) : feed.jobId, table: feed.table, color: color(`series-${(i % 8) + 1}`) }));
  }

  /** Two jobs of one name are told apart by the end of their ids. */
  function labelOf(feed) {
    const name = title(feed.job);
    const isTwin = feeds.some((other) => other !== feed && other.job && title(other.job) === name);
    return isTwin ? `${name} …${feed.jobId.slice(-4)}` : name;
  }

  function draw() {
    gallery.draw();
    const paths = feeds.map((feed) => ({ feed, path: feed.job && pathOf(feed.table) }));
    const measure = paths.every(({ path }) => !path || path.measure === "accuracy") ? "accuracy" : "nll";
    const jobs = paths.filter(({ path }) => path && path.measure === measure)
      .map(({ feed, path }) => ({ id: feed.jobId, label: labelOf(feed), points: path.points }));
    const without = paths.filter(({ path }) => !path || path.measure !== measure).map(({ feed }) => (feed.job ? labelOf(feed) : feed.jobId));
    put(pareto, jobs.length ? h("div.pair", {}, ...scatter(jobs, measure, pareto.clientWidth)) : "",
      without.length ? absent(`Without evaluations of both a validation_file and a retention_file, or in another measure: ${without.join(", ")}.`) : "");
  }
}

async function drawChooser(ids, place) {
  const { data } = await listJobs(50, null);
  const boxes = data.map((job) => h("li", {}, h("label.check", {},
    h("input", { type: "checkbox", value: job.id, checked: ids.includes(job.id) }), ` ${title(job)} `, h("span.quiet", {}, `${job.method.type}, ${state(job)}`))));
  const form = h("form", { onsubmit: (event) => {
    event.preventDefault();
    const chosen = [...form.querySelectorAll("input:checked")].map((box) => encodeURIComponent(box.value));
    location.hash = `#/compare/${chosen.slice(0, MOST_JOBS).join(",")}`;
  } }, h("ul.choices", {}, ...boxes), h("button.primary", {}, "Compare"));
  put(place, h("details", { open: !ids.length }, h("summary", {}, ids.length ? "Other jobs" : `Choose up to ${MOST_JOBS} jobs`),
    data.length ? form : absent("There are no jobs yet.")));
}

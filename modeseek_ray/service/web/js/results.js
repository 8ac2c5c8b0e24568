// Checkpoints, and what each row of the data counted: histogram, most and least weighted rows with their text.

import { get, jobPath } from "./api.js";
import { h, put, s } from "./dom.js";
import { moment, number } from "./format.js";
import { absent, notice } from "./notice.js";

const PAGE = 1000;
const MOST_ROWS = 5000;
const SHOWN = 10;
const BINS = 30;
const WIDEST = 640;
const SAME = 1e-6; // of two mean weights, rounding apart

export function checkpointsSection(jobId) {
  const place = h("div", {}, absent("None yet."));
  const node = h("section", { "aria-labelledby": "checkpoints" }, h("h2", { id: "checkpoints" }, "Checkpoints"), place);
  return { node, load };

  async function load(isOver) {
    try {
      const { data } = await get(jobPath(jobId, "/checkpoints?limit=100"));
      put(place, data.length ? table(data) : absent(isOver ? "None." : "None yet."));
    } catch (error) {
      put(place, notice(error));
    }
  }

  function table(checkpoints) {
    const names = [...new Set(checkpoints.flatMap((each) => Object.keys(each.metrics)))].filter((name) => name !== "step").sort();
    return h("div.scroll", { tabindex: 0, role: "group", "aria-label": "Checkpoints" }, h("table", {},
      h("thead", {}, h("tr", {}, ...["Step", "When", ...names, "Name"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, ...checkpoints.map((each) => h("tr", {},
        h("th", { scope: "row" }, String(each.step_number)), h("td", {}, moment(each.created_at)),
        ...names.map((name) => h("td.n", {}, number(each.metrics[name]))), h("td", {}, h("code", {}, each.fine_tuned_model_checkpoint)))))));
  }
}

export function rowsSection(jobId) {
  const place = h("div", {}, absent("The weights of single rows are written at checkpoints and at the end."));
  const button = h("button", { type: "button", onclick: () => look(false) }, "Look now");
  const node = h("section", { "aria-labelledby": "rows" },
    h("div.heading", {}, h("h2", { id: "rows" }, "What each row counted"), h("span.stretch"), button), place);
  return { node, load };

  /** Only asked for once the job has ended, or by hand: the service reads a whole file for it. */
  async function load(isOver) {
    button.hidden = isOver;
    if (isOver) await look(true);
  }

  async function look(isOver) {
    button.disabled = true;
    try {
      const ledger = await readLedger(jobId);
      put(place, ...(ledger.rows.length ? drawLedger(ledger, place.clientWidth) : [absent("Nothing was weighed yet.")]));
    } catch (error) {
      const none = isOver ? "None: they are written at checkpoints and at the end, and the job came to neither." : error.message;
      put(place, error.code === "weights_not_ready" ? absent(none) : notice(error));
    }
    button.disabled = false;
  }
}

async function readLedger(jobId) {
  const rows = [];
  let page = { has_more: true };
  while (page.has_more && rows.length < MOST_ROWS) {
    page = await get(jobPath(jobId, `/weights?format=json&view=ledger&after=${rows.length}&limit=${PAGE}`));
    rows.push(...page.data);
  }
  return { rows, page };
}

function drawLedger({ rows, page }, room) {
  const first = rows[0].mean;
  if (rows.length === page.total && rows.every((row) => Math.abs(row.mean - first) < SAME)) {
    return [absent(`All ${number(rows.length)} rows counted the same: mean weight ${number(first)}.`)];
  }
  const byWeight = [...rows].sort((a, b) => b.mean - a.mean);
  const count = Math.min(SHOWN, Math.ceil(rows.length / 2));
  const partial = rows.length < page.total ? ` Of ${number(page.total)} rows the first ${number(rows.length)} are looked at here.` : "";
  const steering = page.collect_more?.length
    ? [rowTable("Collect more like these", page.collect_more), rowTable("Sample less of these", page.sample_less)]
    : [rowTable("Most weighted rows", byWeight.slice(0, count)), rowTable("Least weighted rows", byWeight.slice(-count).reverse())];
  return [
    h("p", {}, `${number(page.num_starved)} rows starved and ${number(page.num_dominant)} dominated, of ${number(page.total)}.${partial}`),
    histogram(rows.map((row) => row.mean), Math.min(room || WIDEST, WIDEST)),
    h("div.pair", {}, ...steering),
  ];
}

/** Rows by their mean weight, counts on a log scale so that a single row is seen beside thousands. `width`: pixels. */
function histogram(values, width) {
  const top = Math.max(...values, 1e-9);
  const low = Math.min(...values, 0);
  const counts = new Array(BINS).fill(0);
  for (const value of values) counts[Math.min(Math.floor(((value - low) / (top - low)) * BINS), BINS - 1)] += 1;
  const [height, head, bottom] = [176, 20, 22];
  const tallest = Math.log1p(Math.max(...counts));
  const bars = counts.map((count, i) => {
    const size = count ? Math.max((Math.log1p(count) / tallest) * (height - bottom - head), 2) : 0;
    const range = [i, i + 1].map((edge) => number(low + ((top - low) * edge) / BINS));
    return s("rect.bar", { x: (i * width) / BINS + 1, y: height - bottom - size, width: width / BINS - 2, height: size },
      s("title", {}, `${count} rows of weight ${range.join(" to ")}`));
  });
  const text = (x, anchor, label, y = height - 5) => s("text.tick", { x, y, "text-anchor": anchor }, label);
  const at = (value) => ((value - low) / (top - low)) * width;
  const highest = counts.indexOf(Math.max(...counts));
  const isLeft = highest < BINS / 2;
  const most = text(((highest + (isLeft ? 0 : 1)) * width) / BINS, isLeft ? "start" : "end", `${number(counts[highest])} rows`, head - 6);
  const one = low < 1 && top > 1 ? s("line.one", { x1: at(1), x2: at(1), y1: head, y2: height - bottom }) : "";
  const label = `Histogram of mean weights: ${values.length} rows from ${number(low)} to ${number(top)}, ${counts[0]} of them in the lowest of ${BINS} bins.`;
  return h("figure.histogram", {}, h("h3", {}, "Mean weight of a row"),
    s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...bars, one, most,
      s("line.base", { x1: 0, x2: width, y1: height - bottom, y2: height - bottom }),
      text(0, "start", number(low)), text(width / 2, "middle", number((low + top) / 2)), text(width, "end", number(top))),
    h("figcaption", {}, one ? "The line at 1: counts as in plain fine-tuning." : "1 = counts as in plain fine-tuning.", " Heights are logarithmic."));
}

function rowTable(caption, rows) {
  const hasReward = rows.some((row) => row.reward !== null);
  const columns = ["Row", "Mean weight", "Trend", ...(hasReward ? ["Reward"] : []), "Text"];
  return h("div.scroll", { tabindex: 0, role: "group", "aria-label": caption }, h("table.rows", {},
    h("caption", {}, caption),
    h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...rows.map((row) => h("tr", {},
      h("th", { scope: "row" }, String(row.row)), h("td.n", {}, row.mean < 0.01 ? number(row.mean) : row.mean.toFixed(3)),
      h("td", {}, row.trend ? h("span", { role: "img", "aria-label": TRENDS[row.trend] }, row.trend) : ""),
      hasReward ? h("td.n", {}, number(row.reward)) : "",
      h("td.text", {}, row.text ? [h("span.prompt", {}, row.text.prompt, "\n"), row.text.completion] : "–"))))));
}

const TRENDS = { "↑": "rising", "↓": "falling", "→": "steady" };

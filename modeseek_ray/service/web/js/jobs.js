// All jobs, newest first, kept up to date without disturbing focus or selection.

import { listJobs } from "./api.js";
import { h, put, say } from "./dom.js";
import { hasEnded, moment, number, seconds, state, tail, title } from "./format.js";
import { notice } from "./notice.js";

const EVERY_MS = 3000;
const PAGE = 50;

export function jobsView(place) {
  const rows = new Map();
  const chosen = new Set();
  const older = [];
  const stop = new AbortController();
  const body = h("tbody");
  const problem = h("div");
  const empty = h("p.empty", { hidden: true }, "No jobs yet. ", h("a", { href: "#/submit" }, "Fill in a form"), ", or ",
    h("code", {}, "modeseek submit job.yaml"), ".");
  const more = h("button", { type: "button", hidden: true, onclick: loadOlder }, "Older jobs");
  const compare = h("a.button", { "aria-disabled": "true", title: "Choose jobs first" }, "Compare");
  const table = h("table.jobs", { hidden: true },
    h("caption.unseen", {}, "Jobs, newest first"),
    h("thead", {}, h("tr", {}, ...["", "Job", "State", "Progress", "Method", "Model", "Created", "Result"].map((text) =>
      h("th", { scope: "col" }, text || h("span.unseen", {}, "Choose"))))), body);
  put(place, h("div.heading", {}, h("h1", {}, "Jobs"), h("span.stretch"), compare, h("a.button.primary", { href: "#/submit" }, "New job")),
    problem, empty, h("div.scroll", { tabindex: 0, role: "group", "aria-label": "Jobs" }, table), more);
  document.title = "Jobs · modeseek";
  refresh();
  const timer = setInterval(() => document.hidden || refresh(), EVERY_MS);
  return () => {
    clearInterval(timer);
    stop.abort();
  };

  async function refresh() {
    try {
      const page = await listJobs(PAGE, null, { signal: stop.signal });
      put(problem);
      if (!older.length) more.hidden = !page.has_more;
      const known = new Set(page.data.map((job) => job.id));
      draw([...page.data, ...older.filter((job) => !known.has(job.id))]);
    } catch (error) {
      if (!stop.signal.aborted) put(problem, notice(error));
    }
  }

  async function loadOlder() {
    const last = [...rows.keys()].at(-1);
    const page = await listJobs(PAGE, last, { signal: stop.signal });
    older.push(...page.data);
    more.hidden = !page.has_more;
    refresh();
  }

  function draw(jobs) {
    empty.hidden = jobs.length > 0;
    table.hidden = jobs.length === 0;
    const kept = new Map();
    for (const job of jobs) kept.set(job.id, rows.get(job.id) ?? makeRow(job, chosen, choose));
    const gone = [...rows.keys()].some((id) => !kept.has(id));
    const fresh = [...kept.keys()].some((id) => !rows.has(id));
    rows.clear();
    for (const [id, row] of kept) rows.set(id, row);
    if (gone || fresh) put(body, ...[...rows.values()].map((row) => row.node));
    for (const job of jobs) rows.get(job.id).update(job);
  }

  function choose(id, isChosen) {
    if (isChosen) chosen.add(id);
    else chosen.delete(id);
    say(compare, chosen.size ? `Compare ${chosen.size} chosen` : "Compare");
    if (chosen.size) {
      compare.removeAttribute("aria-disabled");
      compare.setAttribute("href", `#/compare/${[...chosen].map(encodeURIComponent).join(",")}`);
    } else {
      compare.setAttribute("aria-disabled", "true");
      compare.removeAttribute("href");
    }
  }
}

function makeRow(job, chosen, choose) {
  const box = h("input", { type: "checkbox", "aria-label": `Choose ${title(job)} for comparison`, checked: chosen.has(job.id),
    onchange: (event) => choose(job.id, event.target.checked) });
  const status = h("span.status");
  const bar = h("progress", { max: 1, value: 0, "aria-label": `Progress of ${title(job)}` });
  const text = h("span.quiet");
  const result = h("td");
  const name = title(job);
  const node = h("tr", {},
    h("td", {}, box),
    h("th", { scope: "row" }, h("a", { href: `#/jobs/${encodeURIComponent(job.id)}` }, name), name === job.id ? "" : h("span.sub", {}, job.id)),
    h("td", {}, status),
    h("td.progress", {}, bar, text),
    h("td", {}, job.method.type), h("td", {}, h("code.cut", { title: job.model }, tail(job.model))), h("td", {}, moment(job.created_at)), result);
  return { node, update };

  function update(now) {
    status.className = `status ${now.status}`;
    say(status, state(now));
    const { step, total_steps: total, eta_s: eta, tokens_per_s: speed } = now.progress;
    bar.hidden = !total;
    if (total) bar.value = step / total;
    const parts = [total ? `${step}/${total}` : "", hasEnded(now) ? "" : speed ? `${number(Math.round(speed))} tokens/s` : "", eta ? `${seconds(eta)} left` : "",
      now.queue_position && now.estimated_start ? `starts about ${moment(now.estimated_start)}` : ""];
    say(text, parts.filter(Boolean).join(" · "));
    const outcome = now.error ? now.error.code : now.fine_tuned_model ?? "";
    if (result.textContent !== outcome) put(result, outcome ? h("code.cut", { title: outcome }, outcome) : "");
  }
}

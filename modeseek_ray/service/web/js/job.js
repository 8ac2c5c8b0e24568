// One job: where it is, what it learns and forgets, what its rows count, what it was asked.

import { act, download, jobPath, supports } from "./api.js";
import { askSection } from "./ask.js";
import { onThemeChange } from "./chart.js";
import { announce, h, put, say } from "./dom.js";
import { Feed } from "./feed.js";
import { clock, hasEnded, moment, number, seconds, state, title } from "./format.js";
import { Gallery } from "./gallery.js";
import { notice } from "./notice.js";
import { configurationOf, downloadsOf } from "./record.js";
import { checkpointsSection, rowsSection } from "./results.js";
import { rolloutsSection } from "./rollouts.js";

const TEMPLATE = "/v1/fine_tuning/jobs/{job_id}";

export function jobView(place, jobId) {
  const heading = h("h1", {}, jobId);
  const status = h("span.status");
  const actions = h("p.buttons");
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const facts = h("dl.facts");
  const problem = h("div");
  const connection = h("p.quiet", { "aria-live": "polite" });
  const log = h("ol.log");
  const record = h("div");
  const gallery = new Gallery(() => [{ label: null, table: feed.table }]);
  const checkpoints = checkpointsSection(jobId);
  const rows = rowsSection(jobId);
  const rollouts = rolloutsSection();
  const trial = askSection();
  put(place,
    h("div.heading", {}, heading, status, h("span.stretch"), actions), problem, bar, facts, connection,
    h("section", { "aria-labelledby": "curves" }, h("h2", { id: "curves" }, "Curves"), gallery.node),
    h("section", { "aria-labelledby": "history" }, h("h2", { id: "history" }, "What happened"),
      h("div.scroll.tall", { tabindex: 0, role: "group", "aria-label": "What happened, newest first" }, log)),
    trial.node, rollouts.node, rows.node, checkpoints.node, record);
  const feed = new Feed(jobId, draw);
  const unwatch = onThemeChange(() => gallery.restyle());
  let before = null;
  let shownMessage = null;
  feed.start().catch((error) => put(problem, notice(error)));
  return () => {
    feed.stop();
    unwatch();
    gallery.destroy();
  };

  function draw() {
    const { job } = feed;
    drawHead(job);
    drawFacts(job);
    drawConnection();
    drawLog();
    if (feed.rollouts.length) rollouts.draw(feed.rollouts);
    gallery.draw(hasEnded(job));
    if (before?.state !== job.state) onNewState(job);
    else if (before.last_checkpoint_step !== job.last_checkpoint_step) checkpoints.load(hasEnded(job));
    before = job;
  }

  function onNewState(job) {
    if (before) announce(`${title(job)} is ${state(job)}.`);
    put(problem, job.error ? notice(job.error, "The job failed.") : "");
    put(record, ...configurationOf(job), ...downloadsOf(job));
    drawActions(job);
    trial.draw(job.status === "succeeded" ? job.fine_tuned_model : null);
    checkpoints.load(hasEnded(job));
    rows.load(hasEnded(job));
  }

  function drawHead(job) {
    say(heading, title(job));
    document.title = `${title(job)} · modeseek`;
    status.className = `status ${job.status}`;
    say(status, state(job));
    const { step, total_steps: total } = job.progress;
    bar.hidden = !total;
    if (total) bar.value = Math.max(step, feed.table.steps.at(-1) ?? 0) / total;
  }

  function drawFacts(job) {
    const { total_steps: total, tokens_per_s: speed, eta_s: eta } = job.progress;
    const step = Math.max(job.progress.step, feed.table.steps.at(-1) ?? 0); // events are ahead of heartbeats
    const last = (name) => feed.table.last(name);
    const known = [
      ["Step", total ? `${step} of ${total}` : String(step)],
      ["Place in the queue", job.queue_position && String(job.queue_position)],
      ["Starts about", job.estimated_start && !hasEnded(job) && step === 0 ? moment(job.estimated_start) : null],
      ["Time left", eta ? seconds(eta) : null],
      ["Tokens per second", speed ? number(Math.round(speed)) : null],
      ["Loss", number(last("loss"))],
      ["ESS/n", number(last("ess_ratio"))],
      ["New task", Number.isNaN(last("validation.accuracy")) ? null : share(last("validation.accuracy"))],
      ["Old tasks", Number.isNaN(last("retention.accuracy")) ? null : `${share(feed.table.first("retention.accuracy"))} → ${share(last("retention.accuracy"))}`],
      ["Attempt", job.attempt > 1 ? String(job.attempt) : null],
      ["Created", moment(job.created_at)],
      ["Finished", job.finished_at ? moment(job.finished_at) : null],
      ["Took, waiting included", job.finished_at ? seconds(job.finished_at - job.created_at) : null],
      ["Model", job.fine_tuned_model],
    ].filter(([, value]) => value && value !== "–");
    if (facts.childElementCount !== known.length) put(facts, ...known.map(() => h("div", {}, h("dt"), h("dd"))));
    known.forEach(([name, value], i) => {
      facts.children[i].className = name === "Model" ? "wide" : ""; // too long for a column
      say(facts.children[i].firstChild, name);
      say(facts.children[i].lastChild, value);
    });
  }

  function drawConnection() {
    const words = {
      connecting: "Connecting to the stream of events …",
      live: "Following live.",
      reconnecting: "The connection was cut; trying again. Nothing is lost.",
      complete: "The job has ended; this is all of it.",
      lost: feed.error?.message ?? "The stream cannot be read.",
    };
    say(connection, `${words[feed.connection]} ${number(feed.numEvents)} events.`);
  }

  function drawLog() {
    const { messages } = feed;
    if (messages.at(-1) === shownMessage) return;
    const start = messages.indexOf(shownMessage) + 1;
    for (const message of messages.slice(start || Math.max(messages.length - 300, 0))) {
      log.prepend(h(`li.${message.level}`, {}, h("time", {}, clock(message.data?.created_at_s ?? message.created_at)), " ",
        message.level === "info" ? "" : h("strong", {}, message.level === "warn" ? "Warning: " : "Error: "), message.message));
    }
    while (log.childElementCount > 500) log.lastChild.remove();
    shownMessage = messages.at(-1);
  }

  async function drawActions(job) {
    const wanted = [
      ["pause", "Pause", ["running", "checkpointing"].includes(job.state)],
      ["resume", job.status === "failed" ? "Resume as a new job" : "Resume", ["paused", "failed"].includes(job.state)],
      ["cancel", "Cancel", !hasEnded(job) && job.state !== "cancelling"],
    ];
    const buttons = [];
    for (const [action, label, isPossible] of wanted) {
      if (isPossible && (await supports("POST", `${TEMPLATE}/${action}`).catch(() => false))) buttons.push(button(label, () => ask(action)));
    }
    if (job.status === "succeeded") buttons.push(button("Report", () => download(jobPath(jobId, "/report"), `${jobId}.html`)));
    if (job.attempt && (await supports("GET", `${TEMPLATE}/logs`).catch(() => false))) {
      buttons.push(button("Driver's log", () => download(jobPath(jobId, "/logs"), `${jobId}.log`)));
    }
    buttons.push(h("a.button", { href: `#/submit?like=${encodeURIComponent(jobId)}` }, "Again, with changes"),
      h("a.button", { href: `#/compare/${encodeURIComponent(jobId)}` }, "Compare"));
    put(actions, ...buttons);
  }

  function button(label, run) {
    return h("button", { type: "button", onclick: async (event) => {
      event.target.disabled = true;
      try {
        await run();
      } catch (error) {
        put(problem, notice(error));
      }
      event.target.disabled = false;
    } }, label);
  }

  async function ask(action) {
    if (action === "cancel" && !confirm("Cancel this job? Its checkpoints stay.")) return;
    const answer = await act(jobId, action);
    if (answer.id !== jobId) location.hash = `#/jobs/${encodeURIComponent(answer.id)}`; // a failed job never changes
    else await feed.refresh();
  }
}

function share(value) {
  return `${Math.round(100 * value)} %`;
}

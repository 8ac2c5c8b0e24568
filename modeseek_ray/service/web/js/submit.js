// A new job by a form made from the schema of `JobConfig`, checked by the service as one types.

import { get, getJob, openapi, submit, upload, validate } from "./api.js";
import { announce, fresh, h, put, say } from "./dom.js";
import { labelled, makeField } from "./fields.js";
import { bytes, number } from "./format.js";
import { absent, notice } from "./notice.js";
import { bodyOf } from "./record.js";
import { resolve, shape } from "./schema.js";

const PAUSE_MS = 700; // of typing, before the service is asked
const FILES = new Set(["training_file", "validation_file", "retention_file", "replay_file"]);
const MODELS = new Set(["model", "behavior_model"]);
const EXAMPLE = { model: "playground/moe", method: { type: "weighted", weighted: { preset: "anchored" } } };

export function submitView(place, _rest, query) {
  document.title = "New job · modeseek";
  const stop = new AbortController();
  put(place, h("h1", {}, "New job"), absent("Reading what a job may say …"));
  prepare(query.get("like")).then((start) => stop.signal.aborted || build(place, start, stop.signal), (error) => put(place, h("h1", {}, "New job"), notice(error)));
  return () => stop.abort();
}

async function prepare(like) {
  const [document_, files, models, body] = await Promise.all([
    openapi(), get("/v1/files?limit=100&purpose=fine-tune"), get("/v1/models"), like ? getJob(like).then(bodyOf) : EXAMPLE]);
  const root = document_.paths["/v1/fine_tuning/jobs"].post.requestBody.content["application/json"].schema;
  // A schema that was moved to the document's components refers to that document.
  return { schema: resolve(root, document_), root: root.$ref ? document_ : root, files: files.data, models: models.data, body };
}

function build(place, start, signal) {
  const problem = h("div");
  const verdict = h("div.verdict", { "aria-live": "polite" }); // one line, always in sight
  const outlook = h("div"); // what would run
  const host = h("div");
  const json = h("textarea.json", { rows: 14, spellcheck: "false", "aria-label": "The job as JSON" });
  const button = h("button.primary", {}, "Submit the job");
  const form = h("form", { novalidate: true, onsubmit: (event) => (event.preventDefault(), send()) }, host,
    h("details.group", {}, h("summary", {}, "As JSON"), json, h("p", {}, h("button", { type: "button", onclick: takeJson }, "Fill the form from this"))),
    outlook, problem, h("div.bar-below", {}, verdict, button));
  put(place, h("h1", {}, "New job"), h("p.quiet", {}, "What you leave empty is left to the service. It checks the whole as you type, data included, and starts nothing until you submit."), form);
  const places = new Map();
  let field = null;
  let timer = 0;
  let asked = null;
  let idempotencyKey = freshKey();
  signal.addEventListener("abort", () => (clearTimeout(timer), asked?.abort()));
  fill(start.body);

  function fill(body) {
    places.clear();
    const context = { onChange: changed, register, custom: (...each) => customField(start, context, ...each) };
    field = makeField("", null, shape(start.schema, start.root), body, context);
    put(host, field.node);
    changed();
  }

  function register(path, setProblem, control) {
    places.set(path, { setProblem, control });
  }

  function read() {
    return field.read() ?? {};
  }

  function changed() {
    idempotencyKey = freshKey(); // another body is another job
    const body = read();
    if (document.activeElement !== json) json.value = JSON.stringify(body, null, 2);
    clearTimeout(timer);
    asked?.abort();
    const found = [...field.problems(), ...start.schema.required.filter((name) => body[name] === undefined).map((name) => ({ path: name, message: "This is needed.", quiet: true }))];
    for (const { setProblem } of places.values()) setProblem(null);
    for (const each of found) if (!each.quiet) mark(each.path, each.message);
    if (found.length) {
      put(verdict, h("p.quiet", {}, `Still to do: ${found.map((each) => each.path).join(", ")}.`));
      put(outlook);
      return;
    }
    put(verdict, h("p.quiet", {}, "Checking …"));
    timer = setTimeout(ask, PAUSE_MS, body);
  }

  async function ask(body) {
    asked = new AbortController();
    try {
      const answer = await validate(body, { signal: asked.signal });
      put(verdict, drawVerdict(answer));
      put(outlook, ...drawOutlook(answer));
      if (!answer.valid) mark(answer.error?.param, answer.error?.message);
    } catch (error) {
      if (error.name !== "AbortError") put(verdict, notice(error));
    }
  }

  /** At the field itself, or at the nearest one that is shown. */
  function mark(param, message) {
    let path = param ?? "";
    while (path && !places.has(path)) path = path.split(".").slice(0, -1).join(".");
    const found = places.get(path);
    if (!found) return;
    found.setProblem(message);
    for (let node = found.control.parentElement; node && node !== host; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  }

  async function send() {
    put(problem);
    button.disabled = true;
    try {
      const job = await submit(read(), idempotencyKey);
      announce("The job was submitted.");
      location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    } catch (error) {
      put(problem, notice(error, "The job was not accepted."));
      mark(error.param, error.message);
      places.get(error.param)?.control.focus();
    }
    button.disabled = false;
  }

  function takeJson() {
    put(problem);
    try {
      fill(JSON.parse(json.value));
    } catch (error) {
      put(problem, notice({ message: `This is not JSON: ${error.message}` }));
    }
  }
}

/** What the service says of the job: that it would run, or its first problem. */
function drawVerdict({ valid, error }) {
  return valid ? h("p.good", {}, "✓ This job would be accepted.") : h("p.bad", {}, "✗ ", error?.message ?? "The job would be refused.");
}

/** What would run, where it would. */
function drawOutlook({ valid, report }) {
  if (!valid) return [];
  const facts = Object.entries(report).filter(([, value]) => typeof value === "number" || typeof value === "string");
  const rest = Object.entries(report).filter(([, value]) => typeof value === "object" && value !== null);
  return [
    facts.length ? h("dl.facts", {}, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, typeof value === "number" ? number(value) : value)))) : "",
    rest.length ? h("details.group", {}, h("summary", {}, "Plan and data in full"), h("pre", { tabindex: 0 }, JSON.stringify(Object.fromEntries(rest), null, 2))) : "",
  ];
}

/** Files are chosen or uploaded, models suggested; everything else is as the schema says. */
function customField(start, context, path, name, shapeOf, value) {
  if (FILES.has(path)) return fileField(start, context, path, name, shapeOf, value);
  if (MODELS.has(path)) return modelField(start, context, path, name, shapeOf, value);
  return null;
}

function fileField(start, context, path, name, shapeOf, value) {
  const select = h("select", { onchange: context.onChange });
  const fileInput = h("input", { type: "file", accept: ".jsonl,.json,.parquet", "aria-label": `Upload a ${name.replaceAll("_", " ")}`, onchange: send });
  const status = h("span.quiet", { role: "status" });
  options(value ?? "");
  const node = labelled(path, name, shapeOf, select, context);
  select.after(h("span.upload", {}, "or upload ", fileInput, " ", status));
  return { node, read: () => select.value || undefined, problems: () => [] };

  function options(chosen) {
    const known = start.files.some((file) => file.id === chosen);
    put(select, h("option", { value: "" }, "none"), ...start.files.map((file) => h("option", { value: file.id }, `${file.filename} (${bytes(file.bytes)}, ${file.id})`)),
      chosen && !known ? h("option", { value: chosen }, chosen) : "");
    select.value = chosen;
  }

  async function send() {
    const [file] = fileInput.files;
    if (!file) return;
    say(status, `Uploading ${file.name} …`);
    try {
      const stored = await upload(file);
      start.files.unshift(stored);
      options(stored.id);
      say(status, `${file.name} is stored.`);
      context.onChange();
    } catch (error) {
      say(status, error.message);
    }
  }
}

function modelField(start, context, path, name, shapeOf, value) {
  const list = fresh("models");
  const control = h("input", { type: "text", list, oninput: context.onChange, value: value ?? "", spellcheck: "false", autocomplete: "off" });
  const node = labelled(path, name, shapeOf, control, context);
  node.append(h("datalist", { id: list }, ...["playground/moe", "playground/dense", ...start.models.map((model) => model.id)].map((id) => h("option", { value: id }))));
  return { node, read: () => control.value.trim() || undefined, problems: () => [] };
}

/** One key for one body, so that a second click never makes a second job. */
function freshKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// What a job was asked, exactly, and the files it left.

import { download, get } from "./api.js";
import { h, put, say } from "./dom.js";
import { bytes, number } from "./format.js";

const FIELDS = ["model", "training_file", "validation_file", "retention_file", "replay_file", "behavior_model",
  "method", "suffix", "seed", "metadata", "resources", "integrations"];

/** The job as a body that could be submitted again. */
export function bodyOf(job) {
  return Object.fromEntries(FIELDS.filter((name) => job[name] !== null && job[name] !== undefined).map((name) => [name, job[name]]));
}

export function configurationOf(job) {
  const text = JSON.stringify(bodyOf(job), null, 2);
  const copy = h("button", { type: "button", onclick: async () => {
    await navigator.clipboard?.writeText(text);
    copy.textContent = "Copied";
  } }, "Copy");
  return [
    h("section", { "aria-labelledby": "configuration" },
      h("div.heading", {}, h("h2", { id: "configuration" }, "Configuration"), h("span.stretch"), copy),
      h("pre", { tabindex: 0, role: "group", "aria-label": "The configuration as JSON" }, text),
      h("h3", {}, "With what was left to “auto”"), became(job.hyperparameters)),
  ];
}

/** `warmup_steps: 0` and its like, as a table. */
function became(values) {
  const told = ([name, value]) => h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, typeof value === "number" ? number(value) : String(value)));
  return h("dl.settings", {}, ...Object.entries(values).filter(([, value]) => value !== null).map(told));
}

export function downloadsOf(job) {
  if (!job.result_files.length) return [];
  return [h("section", { "aria-labelledby": "files" }, h("h2", { id: "files" }, "Result files"), h("ul.files", {}, ...job.result_files.map(fileRow)))];
}

/** A file by its id, and by its name as soon as the service has said it. */
function fileRow(id) {
  const path = `/v1/files/${encodeURIComponent(id)}`;
  const name = h("code", {}, id);
  const size = h("span.quiet");
  const button = h("button", { type: "button", "aria-label": `Download ${id}`, onclick: () => download(`${path}/content`, name.textContent) }, "Download");
  get(path).then((file) => {
    say(name, file.filename);
    put(size, `${bytes(file.bytes)}, ${id}`);
    button.setAttribute("aria-label", `Download ${file.filename}`);
  }, () => {}); // deleted since: its id is all there is
  return h("li", {}, button, " ", name, " ", size);
}

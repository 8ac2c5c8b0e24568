// What a job was asked, exactly, and the files it left.

import { download } from "./api.js";
import { h } from "./dom.js";

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
      h("p.quiet", {}, "What was left to “auto” became: ", h("code", {}, JSON.stringify(job.hyperparameters)))),
  ];
}

export function downloadsOf(job) {
  if (!job.result_files.length) return [];
  const row = (id) => h("li", {}, h("code", {}, id), " ",
    h("button", { type: "button", onclick: () => download(`/v1/files/${encodeURIComponent(id)}/content`, id) }, "Download"));
  return [h("section", { "aria-labelledby": "files" }, h("h2", { id: "files" }, "Result files"), h("ul.files", {}, ...job.result_files.map(row)))];
}

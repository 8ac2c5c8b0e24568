// The page at /docs: every operation of /openapi.json. Nothing from elsewhere, and no text becomes markup.

import { h, put } from "./dom.js";
import { operationsByTag } from "./operations.js";

const main = document.getElementById("main");

function table(caption, heads, rows) {
  if (rows.length === 0) return null;
  const head = h("thead", {}, h("tr", {}, heads.map((text) => h("th", { scope: "col" }, text))));
  const body = rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell))));
  return h("div.wide", {}, h("table", {}, h("caption", {}, caption), head, h("tbody", {}, body)));
}

function fields(caption, list) {
  const rows = list.map(({ name, type, required, description, preset }) => [
    h("code", {}, name),
    `${type}${required ? ", required" : ""}`,
    [description, preset === undefined || preset === null ? "" : `Default: ${JSON.stringify(preset)}.`].join(" ").trim(),
  ]);
  return table(caption, ["Field", "Type", "What it says"], rows);
}

function operation(told) {
  const places = told.parameters.map(({ name, place, required, type }) => [
    h("code", {}, name), place, `${type}${required ? ", required" : ""}`,
  ]);
  const answers = told.responses.map(({ status, description, bodies }) => [
    status, description, bodies.map(({ media, name }) => `${name} (${media})`).join(", "),
  ]);
  const [good] = told.responses.filter(({ status }) => status.startsWith("2"));
  return h("details", { id: told.id },
    h("summary", {}, h("code", {}, `${told.method} ${told.path}`), ` ${told.summary}`),
    h("p", {}, told.description),
    table("Parameters", ["Name", "Where", "Type"], places),
    told.bodies.map(({ media, fields: list }) => fields(`Request body, ${media}`, list)),
    (good?.bodies ?? []).map(({ media, fields: list }) => fields(`Answer ${good.status}, ${media}`, list)),
    table("Answers", ["Status", "When", "Body"], answers));
}

function open() {
  const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (named?.tagName === "DETAILS") {
    named.open = true;
    named.scrollIntoView();
  }
}

try {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw new Error(`it answered ${answer.status}`);
  const found = await answer.json();
  put(main,
    h("h1", {}, `${found.info.title} ${found.info.version}`),
    h("p", {}, found.info.description),
    h("p.quiet", {}, "Send Authorization: Bearer KEY where the service has keys. Errors are {\"error\": {message, type, param, code}}."),
    operationsByTag(found).map(({ tag, operations }) =>
      h("section", { "aria-label": tag }, h("h2", {}, tag), operations.map(operation))));
  window.addEventListener("hashchange", open);
  open();
} catch (error) {
  put(main, h("h1", {}, "API"), h("p", { role: "alert" }, `/openapi.json cannot be read: ${error.message}.`));
}

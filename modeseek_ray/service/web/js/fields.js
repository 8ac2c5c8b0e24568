// Form fields for the kinds of `schema.js`. What is left empty is left out: the service fills in its default.

import { fresh, h, put, say } from "./dom.js";
import { complaint, fits, isObject } from "./schema.js";

/**
 * A field: `node` to show, `read()` the value (undefined = left out), `problems()` what is wrong locally
 * as `[{path, message}]`. `context`: `register(path, setProblem)`, `onChange()`, `custom(path, field)`.
 */
export function makeField(path, name, shape, value, context) {
  const custom = context.custom(path, name, shape, value);
  if (custom) return custom;
  switch (shape.kind) {
    case "const": return { node: h("span", { hidden: true }), read: () => shape.value, problems: () => [] };
    case "object": return shape.optional ? switchedField(path, name, shape, value, context) : objectField(path, name, shape, value, context);
    case "tagged": return taggedField(path, name, shape, value, context);
    case "choice": return choiceField(path, name, shape, value, context);
    case "enum": return selectField(path, name, shape, value, context);
    case "boolean": return selectField(path, name, { ...shape, values: [true, false] }, value, context);
    default: return textField(path, name, shape, value, context);
  }
}

/** A label, its control, what it means, and a place for what is wrong with it. */
export function labelled(path, name, shape, control, context) {
  const id = fresh("field");
  const problem = h("p.problem", { id: `${id}-problem`, hidden: true });
  const help = shape.description ? h("p.help", { id: `${id}-help` }, ...prose(shape.description)) : "";
  control.id = id;
  control.setAttribute("aria-describedby", `${help ? `${id}-help ` : ""}${id}-problem`);
  context.register(path, (message) => {
    problem.hidden = !message;
    say(problem, message ?? "");
    if (message) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  }, control);
  return h("div.field", {}, h("label", { for: id }, words(name)), control, help, problem);
}

function objectField(path, name, shape, value, context) {
  const inner = { ...context, isAlone: shape.fields.length === 1 };
  const fields = shape.fields.map((field) => makeField(join(path, field.name), field.name, field.shape, value?.[field.name], inner));
  const read = () => collect(shape.fields, fields);
  const node = name === null ? h("div.fields", {}, ...fields.map((field) => field.node)) : group(name, shape, context.isAlone || isWritten(value), fields);
  return { node, read, problems: () => fields.flatMap((field) => field.problems()) };
}

function isWritten(value) {
  return isObject(value) && Object.keys(value).length > 0;
}

function group(name, shape, open, fields) {
  return h("details.group", { open }, h("summary", {}, words(name),
    shape.description ? h("span.quiet", {}, " ", ...prose(shape.description)) : ""), h("div.fields", {}, ...fields.map((field) => field.node)));
}

/** A block that may be left out as a whole: there and empty is not the same as not there. */
function switchedField(path, name, shape, value, context) {
  const place = h("div.variant");
  const box = h("input", { type: "checkbox", checked: isObject(value), onchange: () => (show(undefined), context.onChange()) });
  let inner = null;
  const show = (from) => {
    inner = box.checked ? makeField(path, null, { ...shape, optional: false }, from, nested(context, path)) : null;
    put(place, inner?.node);
  };
  const field = labelled(path, name, shape, box, context);
  field.classList.add("switch");
  show(value);
  return { node: h("div", {}, field, place), read: () => (inner ? inner.read() ?? {} : undefined), problems: () => inner?.problems() ?? [] };
}

/** `type` and the block of that name. */
function taggedField(path, name, shape, value, context) {
  const tag = shape.fields.find((field) => field.name === "type");
  const place = h("div");
  const preset = isObject(value) ? value : isObject(shape.default) ? shape.default : {};
  const chooser = selectField(join(path, "type"), `${name ?? ""} type`, { ...tag.shape, default: undefined, optional: false }, preset.type ?? tag.shape.values[0],
    { ...context, onChange: () => (show({}), context.onChange()) });
  let block = null;
  const show = (from) => {
    const type = chooser.read();
    const field = shape.fields.find((each) => each.name === type);
    block = field ? makeField(join(path, type), null, { ...field.shape, optional: false }, from[type], context) : null;
    put(place, block?.node);
  };
  show(preset);
  return {
    node: h("fieldset", {}, h("legend", {}, words(name)), shape.description ? h("p.help", {}, ...prose(shape.description)) : "", h("div.fields", {}, chooser.node), place),
    read: () => {
      const inner = block?.read();
      return { type: chooser.read(), ...(inner === undefined ? {} : { [chooser.read()]: inner }) };
    },
    problems: () => block?.problems() ?? [],
  };
}

/** One of several shapes; the first choice is to leave it out. */
function choiceField(path, name, shape, value, context) {
  const place = h("div.variant");
  const start = shape.options.findIndex((option) => fits(option.shape, value));
  const select = h("select", { onchange: () => (show(undefined), context.onChange()) },
    h("option", { value: "" }, leftOut(shape)), ...shape.options.map((option, i) => h("option", { value: String(i) }, option.label)));
  select.value = start < 0 ? "" : String(start);
  let inner = null;
  const show = (from) => {
    const option = shape.options[Number(select.value)];
    inner = select.value === "" ? null : makeField(path, option.shape.kind === "object" ? null : `${name} value`, option.shape, from, nested(context, path));
    put(place, inner?.node, option?.shape.description && select.value !== "" ? h("p.help", {}, ...prose(option.shape.description)) : "");
  };
  const node = h("div", {}, labelled(path, name ?? "value", shape, select, context), place);
  show(start < 0 ? undefined : value);
  return {
    node,
    read: () => (inner === null ? undefined : inner.read() ?? (shape.options[Number(select.value)].shape.kind === "object" ? {} : undefined)),
    problems: () => inner?.problems() ?? [],
  };
}

function selectField(path, name, shape, value, context) {
  const isForced = shape.default === undefined && !shape.optional;
  const select = h("select", { onchange: context.onChange },
    isForced ? "" : h("option", { value: "" }, leftOut(shape)), ...shape.values.map((each) => h("option", { value: JSON.stringify(each) }, String(each))));
  if (value !== undefined && value !== null) select.value = JSON.stringify(value);
  return { node: labelled(path, name, shape, select, context), read: () => (select.value === "" ? undefined : JSON.parse(select.value)), problems: () => [] };
}

/** Text, numbers, numbers or "auto", and, as JSON, all that has no control of its own. */
function textField(path, name, shape, value, context) {
  const isJson = ["json", "map"].includes(shape.kind);
  const isNumber = ["number", "integer", "auto"].includes(shape.kind);
  const properties = { oninput: context.onChange, placeholder: leftOut(shape), spellcheck: "false", autocomplete: "off" };
  const control = isJson ? h("textarea", { ...properties, rows: 2 }) : h("input", { ...properties, type: "text", inputmode: isNumber && shape.kind !== "auto" ? "decimal" : null });
  if (value !== undefined && value !== null) control.value = isJson ? JSON.stringify(value) : String(value);
  const parse = () => parseText(control.value.trim(), shape, isJson, isNumber);
  return {
    node: labelled(path, name, shape, control, context),
    read: () => parse().value,
    problems: () => {
      const { problem, value: read } = parse();
      const message = problem ?? complaint(shape.kind === "auto" ? shape.inner : shape, read);
      return message ? [{ path, message }] : [];
    },
  };
}

function parseText(text, shape, isJson, isNumber) {
  if (text === "") return { value: undefined };
  if (shape.kind === "auto" && text === shape.word) return { value: text };
  if (isNumber) {
    const value = Number(text);
    return Number.isFinite(value) ? { value } : { value: text, problem: shape.kind === "auto" ? `A number, or “${shape.word}”.` : "A number is needed." };
  }
  if (!isJson) return { value: text };
  try {
    return { value: JSON.parse(text) };
  } catch {
    return { value: text, problem: shape.kind === "map" ? 'JSON is needed, such as {"name": "value"}.' : "JSON is needed." };
  }
}

function collect(definitions, fields) {
  const entries = definitions.map(({ name }, i) => [name, fields[i].read()]).filter(([, value]) => value !== undefined);
  if (!entries.length) return undefined;
  return Object.fromEntries(entries);
}

/** Within a choice the same path is the chooser's; its problem is shown there. */
function nested(context, path) {
  return { ...context, register: (at, set, control) => (at === path ? undefined : context.register(at, set, control)) };
}

function leftOut(shape) {
  const { default: value } = shape;
  if (value === undefined || value === null || value === "") return shape.optional ? "none" : "";
  return typeof value === "object" ? "default" : `default: ${value}`;
}

function join(path, name) {
  return path ? `${path}.${name}` : name;
}

/** The first paragraph of a docstring; what stands between backticks is code. */
function prose(text) {
  const paragraph = text.split("\n\n")[0].replaceAll("\n", " ");
  return paragraph.split("`").map((part, i) => (i % 2 ? h("code", {}, part) : part));
}

const AS_WRITTEN = { kl: "KL", lora: "LoRA", ess: "ESS", id: "ID" };

function words(name) {
  const text = (name ?? "").trim().split(/[_ ]/).map((word) => AS_WRITTEN[word] ?? word).join(" ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// JSON Schema as pydantic writes it, reduced to the kinds of field a form knows.

const MARKS = ["scheme", "type"]; // constants that tell the variants of a union apart

/** Follows `$ref` within `root`; what stands beside the reference (description, default) wins. */
export function resolve(schema, root) {
  let found = schema;
  while (found.$ref) {
    const { $ref, ...beside } = found;
    const target = $ref.replace(/^#\//, "").split("/").reduce((node, key) => node[key], root);
    found = { ...target, ...beside };
  }
  return found;
}

/**
 * What kind of field a schema asks for:
 *   object {fields, required}   tagged {tag, fields}: an object whose `type` names the block that goes with it
 *   choice {options}            enum {values}   number | integer | string | boolean {limits}
 *   auto {inner, word}: a number or the word "auto"    map | json: written as JSON
 * `optional` says that null is allowed.
 */
export function shape(schema, root) {
  const found = resolve(schema, root);
  const base = { schema: found, description: found.description ?? "", default: found.default, optional: false };
  const variants = found.anyOf ?? found.oneOf;
  if (variants) return union(variants, base, root);
  if (found.const !== undefined) return { ...base, kind: "const", value: found.const };
  if (found.type === "null") return { ...base, kind: "const", value: undefined }; // never to be given
  if (found.enum) return { ...base, kind: "enum", values: found.enum };
  if (found.type === "object") return object(found, base, root);
  if (["number", "integer", "string", "boolean"].includes(found.type)) return { ...base, kind: found.type };
  return { ...base, kind: "json" };
}

function union(variants, base, root) {
  const resolved = variants.map((variant) => resolve(variant, root));
  const rest = resolved.filter((variant) => variant.type !== "null");
  const optional = rest.length < resolved.length;
  if (rest.length === 1 && rest[0].const !== undefined) return { ...base, kind: "enum", values: [rest[0].const], optional };
  if (rest.length === 1) return { ...shape(rest[0], root), ...described(base), optional };
  const word = rest.find((variant) => variant.const !== undefined && variant.type === "string");
  const numbers = rest.filter((variant) => ["number", "integer"].includes(variant.type));
  if (word && numbers.length === 1 && rest.length === 2) {
    return { ...base, kind: "auto", word: word.const, inner: shape(numbers[0], root), optional };
  }
  return { ...base, kind: "choice", options: rest.map((variant) => ({ label: labelOf(variant), shape: shape(variant, root) })), optional };
}

/** A field's own words win over those of the type it refers to. */
function described(base) {
  return base.description ? { description: base.description, default: base.default } : { default: base.default };
}

function object(found, base, root) {
  if (!found.properties) return { ...base, kind: found.additionalProperties?.type === "string" ? "map" : "json" };
  const fields = Object.entries(found.properties).map(([name, schema]) => ({ name, shape: shape(schema, root) }));
  const tag = fields.find(({ name, shape: { kind, values } }) => name === "type" && kind === "enum" && values.some((value) => found.properties[value]));
  return { ...base, kind: tag ? "tagged" : "object", fields, required: found.required ?? [] };
}

/** What a variant is called: its scheme or type, the one key it is written with, or its title. */
function labelOf(variant) {
  const names = Object.keys(variant.properties ?? {});
  const mark = MARKS.map((name) => variant.properties?.[name]?.const).find(Boolean);
  if (mark) return mark;
  if (variant.const !== undefined) return JSON.stringify(variant.const);
  if (names.length === 1) return names[0];
  return variant.title ?? variant.type ?? "other";
}

/** Whether a written value is of a variant's kind: to open the form on a job that exists. */
export function fits(shapeOf, value) {
  if (value === null || value === undefined) return false;
  switch (shapeOf.kind) {
    case "const": return value === shapeOf.value;
    case "enum": return shapeOf.values.includes(value);
    case "number": case "integer": return typeof value === "number";
    case "string": return typeof value === "string";
    case "boolean": return typeof value === "boolean";
    case "auto": return value === shapeOf.word || typeof value === "number";
    case "object": case "tagged": return isObject(value) && objectFits(shapeOf, value);
    case "choice": return shapeOf.options.some((option) => fits(option.shape, value));
    default: return typeof value === "object";
  }
}

function objectFits({ fields, required }, value) {
  const byName = new Map(fields.map((field) => [field.name, field.shape]));
  for (const name of MARKS) {
    const mark = byName.get(name);
    if (mark?.kind === "const" && (value[name] ?? mark.default) !== mark.value) return false;
  }
  return Object.keys(value).every((name) => byName.has(name)) && required.every((name) => name in value);
}

export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** What is wrong with a number or text by its schema, as a sentence; null where nothing is. */
export function complaint(shapeOf, value) {
  const { schema } = shapeOf;
  if (typeof value === "number") {
    if (shapeOf.kind === "integer" && !Number.isInteger(value)) return "A whole number is needed.";
    if (schema.minimum !== undefined && value < schema.minimum) return `At least ${schema.minimum}.`;
    if (schema.maximum !== undefined && value > schema.maximum) return `At most ${schema.maximum}.`;
    if (schema.exclusiveMinimum !== undefined && value <= schema.exclusiveMinimum) return `Above ${schema.exclusiveMinimum}.`;
    if (schema.exclusiveMaximum !== undefined && value >= schema.exclusiveMaximum) return `Below ${schema.exclusiveMaximum}.`;
  }
  if (typeof value === "string" && schema.maxLength !== undefined && value.length > schema.maxLength) return `At most ${schema.maxLength} characters.`;
  return null;
}

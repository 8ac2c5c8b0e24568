// What an OpenAPI document says, in the order people read it. No page here, so that it can be tested alone.

const METHODS = ["get", "post", "put", "patch", "delete"];

/** `[{tag, operations: [{id, method, path, summary, description, parameters, bodies, responses}]}]` */
export function operationsByTag(document) {
  const groups = new Map();
  for (const [path, item] of Object.entries(document.paths)) {
    for (const method of METHODS.filter((name) => item[name])) {
      const told = item[method];
      const tag = told.tags?.[0] ?? "others";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push({
        id: `${method}-${path.replace(/[^A-Za-z0-9]+/g, "-")}`,
        method: method.toUpperCase(),
        path,
        summary: told.summary ?? "",
        description: told.description ?? "",
        parameters: (told.parameters ?? []).map((parameter) => ({
          name: parameter.name,
          place: parameter.in,
          required: parameter.required ?? false,
          type: typeOf(document, parameter.schema ?? {}),
        })),
        bodies: contents(document, told.requestBody?.content),
        responses: Object.entries(told.responses ?? {}).map(([status, response]) => ({
          status,
          description: response.description ?? "",
          bodies: contents(document, response.content),
        })),
      });
    }
  }
  return [...groups].map(([tag, operations]) => ({ tag, operations }));
}

/** The schema that `$ref` leads to; schemas of a body may hold their definitions themselves. */
export function follow(document, schema, root = schema) {
  let found = schema;
  for (let step = 0; found?.$ref && step < 16; step += 1) {
    const names = found.$ref.replace(/^#\//, "").split("/");
    found = [root, document].map((start) => names.reduce((at, name) => at?.[name], start)).find(Boolean);
  }
  return found ?? {};
}

/** A type in a few words: `string, at most 64 characters`, `list of File`, `one of desc, asc`. */
export function typeOf(document, schema, root = schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return `one of ${schema.enum.join(", ")}`;
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return [...new Set(options.map((option) => typeOf(document, option, root)))].join(" or ");
  if (schema.type === "array") return `list of ${typeOf(document, schema.items ?? {}, root)}`;
  const limits = [
    ["minimum", "from"], ["exclusiveMinimum", "above"], ["maximum", "up to"], ["exclusiveMaximum", "below"],
    ["maxLength", "at most", "characters"],
  ].filter(([name]) => schema[name] !== undefined);
  const said = limits.map(([name, word, unit]) => [word, schema[name], unit].filter(Boolean).join(" "));
  return [schema.type ?? "any value", ...said].join(", ");
}

/** `[{media, name, fields: [{name, type, required, description, preset}]}]` */
function contents(document, content) {
  return Object.entries(content ?? {}).map(([media, { schema = {} }]) => {
    const known = follow(document, schema);
    const required = known.required ?? [];
    const fields = Object.entries(known.properties ?? {}).map(([name, field]) => ({
      name,
      type: typeOf(document, field, schema),
      required: required.includes(name),
      description: field.description ?? "",
      preset: field.default,
    }));
    return { media, name: known.title ?? typeOf(document, schema), fields };
  });
}

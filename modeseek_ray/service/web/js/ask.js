// Ask a finished model: a question, an answer that appears as it is written.

import { request } from "./api.js";
import { h, put, say } from "./dom.js";
import { notice } from "./notice.js";
import { parser } from "./stream.js";

const ROUTE = "/v1/chat/completions";

/** `draw(model)` shows the box for a model's name; null hides it. */
export function askSection() {
  const question = h("textarea", { id: "question", rows: 3, required: true });
  const temperature = h("input", { id: "temperature", type: "number", min: 0, max: 2, step: 0.1, value: 1 });
  const submit = h("button.primary", { type: "submit" }, "Ask");
  const answer = h("div", { "aria-live": "polite" });
  const form = h("form", { onsubmit: ask },
    h("p.field", {}, h("label", { for: "question" }, "Question"), question),
    h("p.field", {}, h("label", { for: "temperature" }, "Temperature (0 = the likeliest answer)"), temperature),
    h("p.buttons", {}, submit));
  const node = h("section", { "aria-labelledby": "ask", hidden: true }, h("h2", { id: "ask" }, "Try it"),
    h("p.quiet", {}, "The first question loads the model, which takes a while."), form, answer);
  let model = null;
  return { node, draw };

  function draw(name) {
    model = name;
    node.hidden = !name;
  }

  async function ask(event) {
    event.preventDefault();
    submit.disabled = true;
    const text = h("p.text", {}, "…");
    put(answer, text);
    try {
      const body = {
        model,
        messages: [{ role: "user", content: question.value }],
        temperature: Number(temperature.value),
        max_tokens: 256,
        stream: true,
      };
      let written = "";
      for await (const piece of pieces(await retried(body))) {
        written += piece;
        say(text, written);
      }
      if (!written) say(text, "(empty)");
    } catch (error) {
      put(answer, notice(error));
    }
    submit.disabled = false;
  }
}

/** The stream; while the model is being loaded it is asked for again. */
async function retried(json) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await request("POST", ROUTE, { json });
    } catch (error) {
      if (error.code !== "model_starting" || attempt > 5) throw error;
    }
  }
}

/** The texts of a stream of server-sent events. Throws the error that an event may carry. */
export async function* pieces(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const parse = parser();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const batch = parse(value);
    for (const { error, choices } of batch.events) {
      if (error) throw error;
      yield choices[0]?.delta?.content ?? "";
    }
    if (batch.done) return;
  }
}

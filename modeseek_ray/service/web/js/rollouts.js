// Answers the generator wrote to one question, side by side with their rewards, best first.

import { h, put } from "./dom.js";
import { number } from "./format.js";

/** `draw(rollouts)` gets the events that carry samples, oldest first; nothing is shown before there are any. */
export function rolloutsSection() {
  const select = h("select", { id: "round", onchange: () => show() });
  const place = h("div");
  const node = h("section", { "aria-labelledby": "rollouts", hidden: true },
    h("div.heading", {}, h("h2", { id: "rollouts" }, "Sampled answers"), h("span.stretch"), h("span.round", {}, h("label", { for: "round" }, "Round"), select)), place);
  let events = [];
  let newest = null;
  return { node, draw };

  function draw(rollouts) {
    if (rollouts.at(-1) === newest) return;
    const followed = select.value === "" || select.value === newest?.id; // whoever looks at an old round stays there
    const chosen = select.value;
    events = rollouts;
    newest = rollouts.at(-1);
    node.hidden = false;
    put(select, ...[...events].reverse().map((event) => h("option", { value: event.id }, event.message)));
    select.value = followed || !events.some((event) => event.id === chosen) ? newest.id : chosen;
    show();
  }

  function show() {
    const { data } = events.find((event) => event.id === select.value);
    const sorted = [...data.rollouts].sort((a, b) => (b.reward ?? -Infinity) - (a.reward ?? -Infinity));
    const best = sorted[0]?.reward;
    const isTie = sorted.every((each) => each.reward === best);
    put(place, h("p.text.question", {}, data.prompt), h("ol.answers", {}, ...sorted.map((each) => card(each, !isTie && each.reward === best))),
      isTie ? h("p.quiet", {}, "All rewards are the same: this question tells nothing about what is better.") : "");
  }
}

function card({ text, reward, error }, isBest) {
  const grade = error ? h("span.bad", {}, `not graded: ${error}`) : `reward ${number(reward)}`;
  return h(`li${isBest ? ".best" : ""}`, {}, h("p.grade", {}, isBest ? h("strong", {}, "best, ") : "", grade), h("p.text", {}, text || "(empty)"));
}

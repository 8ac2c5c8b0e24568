// Which curves are drawn together, and the sentence that says how to read them. Names are those of the
// events (`reports/results.py: flatten`); a figure whose columns a job does not have is named as missing.

const only = (name, label) => ({ pattern: new RegExp(`^${name.replaceAll(".", "\\.")}$`), label: () => label });
const each = (pattern, label = (match) => match[1].replaceAll("_", " ")) => ({ pattern, label });

/** `band`: healthy values; `range`: fixed y axis; `bold`: the column that sums up the others; `strip`: a text column drawn under the curves. */
export const FIGURES = [
  {
    id: "loss", title: "Loss", unit: "nats per token",
    lines: [only("loss", "weighted, as minimised"), only("nll", "unweighted")],
    note: "Where the weighted curve lies far below the unweighted one, few easy rows carry the step.",
  },
  {
    id: "ess", title: "Effective sample size, ESS/n", unit: "", range: [0, 1], band: [0.2, 0.5],
    lines: [only("ess_ratio", "ESS/n")],
    note: "1 = every row counts the same, as in plain fine-tuning; below 0.1 too few learn. The band is healthy for a fixed γ; a floor holds the curve above it.",
  },
  {
    id: "gamma", title: "γ, and what bound it", unit: "", strip: "bound_by",
    lines: [only("gamma", "γ")],
    note: "How strongly likelihood decides. The strip says what held γ where it is.",
  },
  {
    id: "beta", title: "β", unit: "reward units", strip: "bound_by",
    lines: [only("beta", "β")],
    note: "The temperature of the reward factor: smaller = sharper.",
  },
  {
    id: "reward", title: "Reward", unit: "",
    lines: [only("rollout.reward", "mean"), only("rollout.reward_std", "standard deviation")],
    note: "Of all samples of a round, those included that tie. Spread near zero: nothing left to choose between.",
  },
  {
    id: "retention", title: "Retention, per old task", unit: "share solved", range: [0, 1], bold: "retention.accuracy",
    lines: [only("retention.accuracy", "all old tasks"), each(/^retention\.(.+)\.accuracy$/)],
    note: "Greedy accuracy on what must not be forgotten.",
  },
  {
    id: "success", title: "New task", unit: "share", range: [0, 1],
    lines: [only("validation.accuracy", "solved"), only("validation.token_accuracy", "tokens right")],
    note: "On the validation file.",
  },
  {
    id: "evaluation-loss", title: "Loss on held-out rows", unit: "nats per token",
    lines: [only("validation.nll", "new task"), only("retention.nll", "old tasks")],
    note: "Falling on the new task while rising on the old ones is forgetting.",
  },
  {
    id: "kl", title: "KL to the start", unit: "nats per token",
    lines: [only("retention.kl_nats", "old tasks"), only("validation.kl_nats", "new task"), only("kl_nats", "training batch")],
    note: "How far the policy has moved from the frozen start.",
  },
  {
    id: "mismatch", title: "Engine against trainer", unit: "",
    lines: [each(/^mismatch\/(.+)$/, (match) => match[1].replaceAll("/", ": ").replaceAll("_", " "))],
    note: "How far the generator's log-probabilities and routes differ from the trainer's for the same tokens.",
  },
  {
    id: "staleness", title: "Staleness", unit: "steps",
    lines: [only("rollout.staleness", "mean")],
    note: "How many weight versions lay between writing a sample and training on it.",
  },
  {
    id: "speed", title: "Speed", unit: "trained tokens per second",
    lines: [only("tokens_per_s", "tokens/s")],
    note: "Trained tokens over the whole step, padding not counted.",
  },
  {
    id: "seconds", title: "Time of a step, by part", unit: "seconds",
    lines: [only("seconds_total", "whole step"), each(/^seconds_(?!total$)(.+)$/)],
    note: "What a step waits for.",
  },
  {
    id: "rounds", title: "Time of a round, by part", unit: "seconds",
    lines: [each(/^rollout\.(.+)_s$/), each(/^sync\.(.*)seconds$/, (match) => `handing over: ${match[1].replaceAll("_", " ").trim() || "all of it"}`)],
    note: "Writing, grading and handing over, beside the training steps.",
  },
  {
    id: "left-out", title: "Samples left out", unit: "",
    lines: [only("rollout.tied_groups", "groups that tie"), only("rollout.failed_samples", "not graded"), only("rollout.stale_samples", "too old")],
    note: "Groups whose rewards all tie tell nothing; many of them mean that questions are too easy or too hard.",
  },
  {
    id: "optimisation", title: "Gradient norm", unit: "",
    lines: [only("grad_norm", "before clipping")],
    note: "Spikes are single rows with large gradients: look at the most weighted rows.",
  },
];

const MOST_LINES = 12;

/** `[{name, label}]` of the columns a figure draws, in the order of its definition. */
export function linesOf(figure, names) {
  const found = new Map();
  for (const { pattern, label } of figure.lines) {
    for (const name of names) {
      const match = pattern.exec(name);
      if (match && !found.has(name)) found.set(name, { name, label: label(match) });
    }
  }
  return [...found.values()].slice(0, MOST_LINES);
}

/** The columns no figure draws: offered one by one. */
export function otherNames(names) {
  const drawn = new Set(FIGURES.flatMap((figure) => linesOf(figure, names).map((line) => line.name)));
  return names.filter((name) => !drawn.has(name)).sort();
}

/** A figure of one column. */
export function figureOf(name) {
  return { id: `only-${name}`, title: name, unit: "", lines: [only(name, name)], note: "" };
}

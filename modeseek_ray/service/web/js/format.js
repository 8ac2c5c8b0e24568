// Numbers, times and states as people read them.

const NONE = "–";

/** Four significant digits; very large and very small ones as powers of ten. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function percent(value) {
  return Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : NONE;
}

/** `75` → `1 min 15 s`. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(value % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** The end of a long path; the whole of anything else. */
export function tail(name) {
  return name.startsWith("/") ? `…/${name.split("/").filter(Boolean).slice(-2).join("/")}` : name;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  let rest = value;
  for (; rest >= 1024 && i < units.length - 1; i += 1) rest /= 1024;
  return `${i ? rest.toFixed(1) : rest} ${units[i]}`;
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

export function moment(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
}

const ENDED = new Set(["succeeded", "failed", "cancelled"]);

export function hasEnded(job) {
  return ENDED.has(job.status);
}

/** The name a person gave the job, else its id. */
export function title(job) {
  return job.suffix || job.metadata?.name || job.id;
}

/** One word for the state, and the place in the queue where there is one. */
export function state(job) {
  const word = job.status.replaceAll("_", " ");
  if (job.queue_position) return `${word}, ${ordinal(job.queue_position)} in line`;
  const finer = ["pausing", "cancelling", "recovering", "starting"].includes(job.state) && !hasEnded(job);
  return finer ? `${word} (${job.state})` : word;
}

function ordinal(n) {
  const tens = n % 100;
  const ending = tens > 10 && tens < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th";
  return `${n}${ending}`;
}

// A job's events as they come, over fetch: EventSource could not carry the key.

import { jobPath, request } from "./api.js";

const LONGEST_WAIT_MS = 15_000;
const SILENCE_MS = 60_000; // the service sends a comment every 15 s; longer silence is a dead connection

/**
 * Arrays of events, everything from the beginning, in order, once; ends when the job has.
 * A cut connection is taken up again behind the last event. `onState` hears "live" or "reconnecting".
 */
export async function* jobEvents(jobId, signal, onState) {
  let last = null;
  let wait = 500;
  while (!signal.aborted) {
    try {
      for await (const batch of connection(jobId, last, signal, () => onState("live"))) {
        wait = 500;
        if (batch.events.length) {
          last = batch.events.at(-1).id;
          yield batch.events;
        }
        if (batch.done) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.status >= 400 && error.status < 500) throw error;
    }
    onState("reconnecting");
    await pause(wait, signal);
    wait = Math.min(2 * wait, LONGEST_WAIT_MS);
  }
}

async function* connection(jobId, last, signal, onOpen) {
  const silence = new AbortController();
  const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
  const answer = await request("GET", `${jobPath(jobId, "/events")}?stream=true`, {
    headers,
    signal: AbortSignal.any([signal, silence.signal]),
  });
  onOpen();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  const parse = parser();
  let timer = 0;
  try {
    for (;;) {
      timer = setTimeout(() => silence.abort(), SILENCE_MS);
      const { value, done } = await reader.read();
      clearTimeout(timer);
      if (done) return;
      yield parse(value);
    }
  } finally {
    clearTimeout(timer);
    silence.abort();
  }
}

/** Text in pieces in, `{events, done}` out. Only `data:` lines matter: each event's id is in its data too. */
export function parser() {
  let rest = "";
  return (text) => {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    const events = [];
    let done = false;
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") done = true;
      else events.push(JSON.parse(data));
    }
    return { events, done };
  };
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

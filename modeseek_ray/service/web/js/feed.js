// One job, followed: its object, its figures, its messages. Views ask it; it tells them that something changed.

import { getJob } from "./api.js";
import { hasEnded } from "./format.js";
import { jobEvents } from "./stream.js";
import { MetricTable } from "./table.js";

const JOB_EVERY_MS = 2000;
const REDRAW_EVERY_MS = 200;
const SLICE_MS = 12; // of work between two chances for the browser to paint
const MOST_MESSAGES = 500;
const MOST_ROLLOUTS = 50;

export class Feed {
  job = null;
  table = new MetricTable();
  messages = [];
  rollouts = []; // messages that show samples of the generator
  numEvents = 0;
  connection = "connecting";
  error = null;
  #attempt = 1;
  #stop = new AbortController();
  #waiting = false;
  #lastTold = 0;

  /** `onChange(feed)` is called at most five times a second, however many events there are. */
  constructor(jobId, onChange) {
    this.jobId = jobId;
    this.onChange = onChange;
  }

  /** Read the job once (throws where there is none), then follow it. */
  async start() {
    this.job = await getJob(this.jobId, { signal: this.#stop.signal });
    this.#tell();
    this.#follow();
    this.#poll();
  }

  stop() {
    this.#stop.abort();
  }

  /** Read the job again now: something was asked of it. */
  async refresh() {
    this.job = await getJob(this.jobId, { signal: this.#stop.signal });
    this.#tell();
  }

  async #follow() {
    try {
      for await (const events of jobEvents(this.jobId, this.#stop.signal, (state) => this.#connected(state))) {
        await this.#takeAll(events);
      }
      this.connection = "complete";
      await this.refresh();
    } catch (error) {
      if (this.#stop.signal.aborted) return;
      this.connection = "lost";
      this.error = error;
      this.#tell();
    }
  }

  async #takeAll(events) {
    let began = performance.now();
    for (const event of events) {
      this.#take(event);
      if (performance.now() - began < SLICE_MS) continue;
      this.#tell();
      await new Promise((resolve) => setTimeout(resolve));
      began = performance.now();
    }
    this.#tell();
  }

  #take(event) {
    this.numEvents += 1;
    const attempt = event.data?.attempt ?? this.#attempt;
    if (event.type === "metrics" && Number.isFinite(event.data.step)) {
      this.table.add(event.data.step, event.data, attempt > this.#attempt);
      this.#attempt = Math.max(attempt, this.#attempt);
    }
    if (event.data?.rollouts) this.rollouts = [...this.rollouts, event].slice(-MOST_ROLLOUTS);
    if (event.type === "message" || event.level !== "info") {
      this.messages.push(event);
      // Warnings and errors outlive a flood of news.
      if (this.messages.length > 2 * MOST_MESSAGES) {
        const old = this.messages.slice(0, MOST_MESSAGES).filter((message) => message.level !== "info");
        this.messages = [...old.slice(-MOST_MESSAGES), ...this.messages.slice(MOST_MESSAGES)].slice(-2 * MOST_MESSAGES + 1);
      }
    }
  }

  #connected(state) {
    this.connection = state;
    this.#tell();
  }

  async #poll() {
    while (!this.#stop.signal.aborted && !hasEnded(this.job)) {
      await new Promise((resolve) => setTimeout(resolve, JOB_EVERY_MS));
      if (document.hidden || this.#stop.signal.aborted) continue;
      await this.refresh().catch(() => {}); // the stream's own state says when the service is away
    }
  }

  #tell() {
    if (this.#waiting) return;
    this.#waiting = true;
    const wait = Math.max(REDRAW_EVERY_MS - (performance.now() - this.#lastTold), 0);
    setTimeout(() => requestAnimationFrame(() => {
      this.#waiting = false;
      this.#lastTold = performance.now();
      if (!this.#stop.signal.aborted) this.onChange(this);
    }), wait);
  }
}

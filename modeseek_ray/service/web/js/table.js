// A job's figures: one row per step, one column per name, in typed arrays that grow by doubling.

const TEXTS = new Set(["bound_by"]);
const NOT_FIGURES = new Set(["step", "total_steps", "attempt", "created_at_s", "eta_s"]);

export class MetricTable {
  #capacity = 256;
  #steps = new Float64Array(this.#capacity);
  #columns = new Map();
  #texts = new Map();
  length = 0;

  /** The steps there are figures of, ascending. */
  get steps() {
    return this.#steps.subarray(0, this.length);
  }

  get names() {
    return [...this.#columns.keys()];
  }

  /** A column's values, NaN where a step has none; null for a name that never came. */
  column(name) {
    return this.#columns.get(name)?.subarray(0, this.length) ?? null;
  }

  /** A text column, undefined where a step has none; null for a name that never came. */
  text(name) {
    return this.#texts.get(name) ?? null;
  }

  /** The newest value of a column, or NaN. */
  last(name) {
    return this.at(name, this.length - 1);
  }

  /** The newest value at or before row `i`, or NaN. */
  at(name, i) {
    const values = this.#columns.get(name);
    for (let row = i; values && row >= 0; row -= 1) {
      if (!Number.isNaN(values[row])) return values[row];
    }
    return Number.NaN;
  }

  /** The first value of a column, or NaN. */
  first(name) {
    const values = this.column(name);
    return values?.find((value) => !Number.isNaN(value)) ?? Number.NaN;
  }

  /**
   * Add the figures of a step; those of a step that is there already complete its row. A step that
   * lies further back comes from an attempt that resumed: what was recorded beyond it is forgotten,
   * as the service's own files do.
   */
  add(step, figures, resumed = false) {
    if (resumed) while (this.length && this.#steps[this.length - 1] >= step) this.#drop();
    while (this.length && this.#steps[this.length - 1] > step) this.#drop();
    if (!this.length || this.#steps[this.length - 1] !== step) this.#push(step);
    const row = this.length - 1;
    for (const name in figures) {
      const value = figures[name];
      if (typeof value === "number") {
        if (!NOT_FIGURES.has(name)) this.#column(name)[row] = value;
      } else if (typeof value === "string" && TEXTS.has(name)) {
        if (!this.#texts.has(name)) this.#texts.set(name, []);
        this.#texts.get(name)[row] = value;
      }
    }
  }

  #push(step) {
    if (this.length === this.#capacity) this.#grow();
    this.#steps[this.length] = step;
    this.length += 1;
  }

  #drop() {
    this.length -= 1;
    for (const values of this.#columns.values()) values[this.length] = Number.NaN;
    for (const values of this.#texts.values()) values[this.length] = undefined;
  }

  #column(name) {
    let values = this.#columns.get(name);
    if (!values) {
      values = new Float64Array(this.#capacity).fill(Number.NaN);
      this.#columns.set(name, values);
    }
    return values;
  }

  #grow() {
    this.#capacity *= 2;
    const larger = (old) => {
      const values = new Float64Array(this.#capacity).fill(Number.NaN);
      values.set(old);
      return values;
    };
    this.#steps = larger(this.#steps);
    for (const [name, values] of this.#columns) this.#columns.set(name, larger(values));
  }
}

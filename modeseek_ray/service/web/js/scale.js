// Axes and readings of a figure. No page here, so that it can be tested alone.

/** The y axis: a little room around the values, and zero in sight where it is near. A level line is not blown up. */
export function rangeOf(low, high) {
  if (low === null) return [0, 1];
  if (high - low < 1e-9 * Math.abs(high)) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) return [0, 1]; // nothing but zeros
  const [from, to] = [Math.min(low, 0), Math.max(high, 0)];
  const [bottom, top] = to - from < 2 * (high - low) ? [from, to] : [low, high];
  const room = 0.06 * (top - bottom);
  return [bottom === 0 ? 0 : bottom - room, top === 0 ? 0 : top + room];
}

/** The newest value at or before a place: between evaluations the last one holds. */
export function newest(values, index) {
  for (let i = index ?? -1; i >= 0; i -= 1) if (Number.isFinite(values[i])) return values[i];
  return null;
}

/** A tick's words. */
export function short(tick) {
  const size = Math.abs(tick);
  if (size !== 0 && (size >= 1e5 || size < 1e-3)) return tick.toExponential(0);
  return String(Number(tick.toPrecision(6)));
}

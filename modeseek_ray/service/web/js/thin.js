// As many points as a screen can show: the least and the greatest of each slice, so that no spike is lost.

/** The first index whose x is at least `value`; x ascends. */
export function lowerBound(x, value) {
  let low = 0;
  let high = x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** `{x, y}` of at most `2 * slices + 1` points within [from, to], in order; NaNs are passed over. */
export function thin(x, y, slices, from = -Infinity, to = Infinity) {
  // One point beyond each end keeps the line going to the edge.
  const start = Math.max(lowerBound(x, from) - 1, 0);
  const stop = Math.min(lowerBound(x, to) + 1, x.length);
  const out = { x: [], y: [] };
  const size = Math.max((stop - start) / slices, 1);
  if (size <= 2) {
    for (let i = start; i < stop; i += 1) keep(out, x, y, i);
    return out;
  }
  for (let slice = 0; slice < slices; slice += 1) {
    const end = slice === slices - 1 ? stop : start + Math.floor((slice + 1) * size);
    let low = -1;
    let high = -1;
    for (let i = start + Math.floor(slice * size); i < end; i += 1) {
      if (Number.isNaN(y[i])) continue;
      if (low < 0 || y[i] < y[low]) low = i;
      if (high < 0 || y[i] > y[high]) high = i;
    }
    if (low < 0) continue;
    keep(out, x, y, Math.min(low, high));
    if (low !== high) keep(out, x, y, Math.max(low, high));
  }
  // The newest value is what people look for: it is kept as it is.
  let last = stop - 1;
  while (last >= start && Number.isNaN(y[last])) last -= 1;
  if (last >= start && out.x.at(-1) !== x[last]) keep(out, x, y, last);
  return out;
}

/** Several lines over one axis: `[x, y1, y2, …]`, undefined where a line has no point there. */
export function align(lines) {
  const all = new Set();
  for (const line of lines) for (const x of line.x) all.add(x);
  const xs = Float64Array.from(all).sort();
  return [Array.from(xs), ...lines.map((line) => spread(line, xs))];
}

function spread(line, xs) {
  const values = new Array(xs.length).fill(undefined);
  let next = 0;
  for (let i = 0; i < xs.length && next < line.x.length; i += 1) {
    if (xs[i] === line.x[next]) {
      values[i] = line.y[next];
      next += 1;
    }
  }
  return values;
}

function keep(out, x, y, i) {
  if (Number.isNaN(y[i])) return;
  out.x.push(x[i]);
  out.y.push(y[i]);
}

// The scales of the front's chart: linear, with a break below a budget that is far above all trials, or logarithmic.

const HEIGHT = 420;
const STRIP = 34; // pixels of the strip that holds a far budget
const GAP = 6; // pixels of the break below it

/** Ticks at round numbers, at most about `count` of them. */
function ticks(low, high, count) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count));
  const wide = [1, 2, 5, 10].map((times) => times * step).find((one) => (high - low) / one <= count);
  const found = [];
  for (let at = Math.ceil(low / wide); at * wide <= high; at += 1) found.push(Number((at * wide).toPrecision(12)));
  return found;
}

/** The scale of the compression, and where on it a value stands, from 0 to 1. */
function compressions(shown, logarithmic) {
  const sizes = shown.length ? shown.map((trial) => trial.compression) : [1, 4];
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  const pad = 0.04 * (most - least || 1);
  const [from, to] = [Math.max(least - pad, 0.9 * least), most + pad];
  const along = logarithmic ? Math.log : (value) => value;
  return {
    scale: { type: logarithmic ? "log" : "linear", domain: [from, to] },
    fraction: (value) => (along(value) - along(from)) / (along(to) - along(from)),
  };
}

/** The scale of the increase; shares: of the chart's height from its top, where each value of the domain stands. */
function increases(search, shown, logarithmic) {
  const reach = (trial, sign) => trial.increase + (search.onFront.has(trial.trial) ? sign * trial.spread : 0);
  const high = shown.length ? Math.max(...shown.map((trial) => reach(trial, 1))) : search.budget;
  const low = Math.min(0, ...shown.map((trial) => reach(trial, -1)));
  return logarithmic ? logarithmicScale(search, shown, low, high) : linearScale(search.budget, low, high);
}

/** Logarithmic away from zero and linear around it, since an increase may be negative. */
function logarithmicScale(search, shown, low, high) {
  const small = shown.map((trial) => Math.abs(trial.increase)).filter((one) => one > 0);
  const constant = Math.max(Math.min(...small, search.budget), search.budget / 1000);
  const domain = [1.2 * low - constant / 4, 1.2 * Math.max(high, search.budget)];
  const powers = [-4, -3, -2, -1, 0, 1, 2, 3].flatMap((power) => [1, 3].map((times) => times * 10 ** power));
  const values = [0, ...powers, search.budget].filter((one) => one <= domain[1] && (one === 0 || one >= constant / 3));
  const fraction = vega.scale("symlog")().domain(domain).constant(constant).range([1, 0]);
  return { broken: false, values, fraction, scale: { type: "symlog", constant, domain }, shares: [1, 0] };
}

/** Linear, in two pieces where the budget is far above all else. */
function linearScale(budget, low, high) {
  const broken = high < 0.6 * budget;
  const most = broken ? high : Math.max(high, budget);
  const margin = 0.08 * (most - low || 1);
  const [bottom, top] = [low - margin, most + margin];
  const shares = broken ? [1, (STRIP + GAP) / HEIGHT, STRIP / HEIGHT, 0] : [1, 0];
  return {
    broken,
    values: [...ticks(bottom, top, 7), ...(broken ? [budget] : [])],
    fraction: (value) => shares[1] + ((1 - shares[1]) * (top - value)) / (top - bottom),
    scale: { type: "linear", domain: broken ? [bottom, top, 0.93 * budget, 1.07 * budget] : [bottom, top] },
    shares,
  };
}

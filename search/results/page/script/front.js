// The front: every trial's increase against its compression, as a chart that can be pointed at, focused and clicked.

const NAMED = {
  "uniform fp16": ["square", "green"],
  conservative: ["triangle-up", "orange"],
  aggressive: ["triangle-down", "red"],
  "uniform int8": ["diamond", "pink"],
  cumulative: ["cross", "sky"],
};
const HEIGHT = 420;
const STRIP = 34;
const REACH = 18; // pixels from a point within which the pointer means it

/** Ticks at round numbers, about `count` of them. */
function ticks(low, high, count) {
  const step = 10 ** Math.floor(Math.log10((high - low) / count));
  const wide = [1, 2, 5, 10].map((times) => times * step).find((one) => (high - low) / one <= count);
  const found = [];
  for (let at = Math.ceil(low / wide); at * wide <= high; at += 1) found.push(Number((at * wide).toPrecision(12)));
  return found;
}

class FrontChart {
  /** actions: select(trial), compare(trial); place: the element that holds the chart. */
  constructor(place, tooltip, actions) {
    this.place = place;
    this.tooltip = tooltip;
    this.actions = actions;
    this.view = null;
    place.addEventListener("pointermove", (event) => this.pointed(event));
    place.addEventListener("pointerleave", () => this.tooltip.hide());
    place.addEventListener("click", (event) => this.clicked(event));
    place.addEventListener("keydown", (event) => this.keyed(event));
  }

  /** Draw a search anew; picked: trials A and B, or null; scales: whether each axis is logarithmic. */
  async draw(search, picked, scales) {
    this.search = search;
    this.shown = search.trials.filter((trial) => trial.increase !== null && trial.increase <= 3 * search.budget);
    this.view?.finalize();
    const spec = frontSpec(search, this.shown, scales, this.place.clientWidth);
    this.view = new vega.View(vega.parse(spec), { renderer: "svg", container: this.place, hover: false });
    await this.pick(picked);
    this.makeFocusable();
  }

  /** Put rings around the picked trials. */
  async pick(picked) {
    const rings = ["A", "B"].map((word, at) => ({ word, trial: picked[at] }))
      .filter((ring) => this.shown.includes(ring.trial))
      .map((ring) => ({ word: ring.word, x: ring.trial.compression, y: ring.trial.increase }));
    await this.view.data("picked", rings).runAsync();
  }

  /** Points of the front can be reached by Tab once, and then by arrows. */
  makeFocusable() {
    const order = this.search.front.map((number) => this.search.trial(number)).filter((one) => this.shown.includes(one));
    this.points = [...this.place.querySelectorAll(".front-points path")];
    this.points.forEach((point, at) => {
      point.setAttribute("tabindex", at === 0 ? "0" : "-1");
      point.setAttribute("role", "button");
      point.setAttribute("data-trial", order[at].trial);
      point.setAttribute("aria-label", this.search.lines(order[at]).join("; "));
      point.addEventListener("focus", () => {
        const box = point.getBoundingClientRect();
        this.tooltip.show(this.search, order[at], box.right, box.top);
      });
      point.addEventListener("blur", () => this.tooltip.hide());
    });
  }

  /** The trial nearest to a place of the window, null where none is near; on the front they are nearer. */
  nearest(x, y) {
    const box = this.place.querySelector("svg").getBoundingClientRect();
    const [left, top] = this.view.origin();
    const [across, up] = [this.view.scale("x"), this.view.scale("y")];
    let [best, least] = [null, REACH];
    for (const trial of this.shown) {
      const far = Math.hypot(across(trial.compression) + left + box.left - x, up(trial.increase) + top + box.top - y);
      const away = this.search.onFront.has(trial.trial) ? far - 4 : far;
      if (away < least) [best, least] = [trial, away];
    }
    return best;
  }

  pointed(event) {
    const trial = this.nearest(event.clientX, event.clientY);
    this.place.style.cursor = trial ? "pointer" : "default";
    if (trial) this.tooltip.show(this.search, trial, event.clientX, event.clientY);
    else this.tooltip.hide();
  }

  clicked(event) {
    const trial = this.nearest(event.clientX, event.clientY);
    if (trial) (event.shiftKey ? this.actions.compare : this.actions.select)(trial);
  }

  keyed(event) {
    const at = this.points.indexOf(event.target);
    if (at < 0) return;
    const trial = this.search.trial(Number(event.target.dataset.trial));
    const step = { ArrowRight: -1, ArrowUp: -1, ArrowLeft: 1, ArrowDown: 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.actions.select(trial);
    else if (event.key === "c") this.actions.compare(trial);
    else if (step && this.points[at + step]) {
      this.points[at].setAttribute("tabindex", "-1");
      this.points[at + step].setAttribute("tabindex", "0");
      this.points[at + step].focus();
    } else return;
    event.preventDefault();
  }
}

/** Domains and ranges of the increase: where the budget is far above all trials it has a strip above a break. */
function increases(search, shown, logarithmic) {
  const budget = search.budget;
  const tops = shown.map((trial) => trial.increase + (search.onFront.has(trial.trial) ? trial.spread : 0));
  const bottoms = shown.map((trial) => trial.increase - (search.onFront.has(trial.trial) ? trial.spread : 0));
  let high = Math.max(...tops, shown.length ? -Infinity : budget);
  const low = Math.min(0, ...bottoms);
  if (logarithmic) {
    const small = shown.map((trial) => Math.abs(trial.increase)).filter((one) => one > 0);
    const constant = Math.max(Math.min(...small, budget), budget / 1000);
    const all = [0, ...[-2, -1, 0, 1, 2, 3].flatMap((power) => [1, 3].map((times) => times * 10 ** power))];
    high = Math.max(high, budget) * 1.2;
    const values = [...all, budget].filter((one) => one <= high && (one === 0 || one >= constant / 3));
    const scale = { type: "symlog", constant, domain: [Math.min(low, 0) * 1.2 - constant / 4, high], range: [HEIGHT, 0] };
    return { broken: false, values, scale };
  }
  const broken = high < 0.6 * budget;
  if (!broken) high = Math.max(high, budget);
  const margin = 0.08 * (high - low || 1);
  const [bottom, top] = [low - margin, high + margin];
  const domain = broken ? [bottom, top, 0.93 * budget, 1.07 * budget] : [bottom, top];
  const range = broken ? [HEIGHT, STRIP + 6, STRIP, 0] : [HEIGHT, 0];
  return { broken, values: [...ticks(bottom, top, 7), ...(broken ? [budget] : [])], scale: { type: "linear", domain, range } };
}

/** The chart as Vega reads it. Texts of the study do not come into it: points are drawn by their numbers alone. */
function frontSpec(search, shown, scales, width) {
  const up = increases(search, shown, scales.increase);
  const sizes = shown.map((trial) => trial.compression);
  const [least, most] = [Math.min(...sizes, 4), Math.max(...sizes, sizes.length ? 0 : 4)];
  const pad = 0.04 * (most - least || 1);
  const row = (trial) => ({
    x: trial.compression, y: trial.increase, low: trial.increase - trial.spread, high: trial.increase + trial.spread,
    shape: NAMED[trial.origin]?.[0] ?? "circle", colour: toned(NAMED[trial.origin]?.[1] ?? "blue"),
  });
  const onFront = search.front.map((number) => search.trial(number)).filter((trial) => shown.includes(trial));
  const steps = onFront.filter((trial, at) => onFront.slice(0, at).every((one) => one.increase > trial.increase));
  const others = shown.filter((trial) => !search.onFront.has(trial.trial));
  const winner = shown.filter((trial) => trial.trial === search.winner);
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json",
    width, height: HEIGHT, padding: 4, autosize: { type: "fit", contains: "padding" }, background: null,
    data: [
      { name: "front", values: onFront.map(row) },
      { name: "steps", values: steps.map(row) },
      { name: "named", values: others.filter((trial) => NAMED[trial.origin] && !trial.stopped).map(row) },
      { name: "others", values: others.filter((trial) => !NAMED[trial.origin] && !trial.stopped).map(row) },
      { name: "stopped", values: others.filter((trial) => trial.stopped).map(row) },
      { name: "winner", values: winner.map(row) },
      { name: "picked", values: [] },
    ],
    scales: [
      {
        name: "x", type: scales.compression ? "log" : "linear", zero: false, nice: false,
        domain: [Math.max(least - pad, 0.1), most + pad], range: [0, { signal: "width" }],
      },
      { name: "y", zero: false, nice: false, ...up.scale, range: up.scale.range.map((at) => ({ signal: `${at / HEIGHT} * height` })) },
    ],
    axes: [
      { scale: "x", orient: "bottom", title: `compression over FP32 (×), larger is smaller on disk${search.target ? ` as ${search.target}` : ""}`, grid: true, tickCount: 8, format: scales.compression ? ".3~g" : "~g", labelOverlap: "parity" },
      { scale: "y", orient: "left", title: `${search.metric.axis}, lower is better`, grid: true, values: up.values, format: "~g", labelOverlap: "greedy" },
    ],
    marks: frontMarks(search, up.broken),
    config: chartConfig(),
  };
}

/** Colours and type of every chart. */
function chartConfig() {
  const [ink, grid, font] = [toned("ink"), toned("grid"), "system-ui, sans-serif"];
  return {
    axis: {
      labelColor: ink, titleColor: ink, gridColor: grid, domainColor: toned("soft"), tickColor: toned("soft"),
      labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12.5, titleFontWeight: 500, titlePadding: 10,
    },
    text: { font, fontSize: 12, fill: ink },
  };
}

function frontMarks(search, broken) {
  const [x, y] = [{ scale: "x", field: "x" }, { scale: "y", field: "y" }];
  const at = (value) => ({ scale: "y", value });
  const symbols = (name, data, encoded) => ({ type: "symbol", name, from: { data }, aria: false, encode: { update: { x, y, ...encoded } } });
  const [paper, ink, grey, blue, red] = ["paper", "ink", "grey", "blue", "red"].map(toned);
  const label = `budget, +${Number(search.budget.toPrecision(6))} ${search.metric.unit}`;
  const slash = (px, above) => ({ type: "rule", aria: false, encode: { update: { x: { value: px - 5 }, x2: { value: px + 5 }, y: { signal: `height * ${above / HEIGHT} + 3` }, y2: { signal: `height * ${above / HEIGHT} - 3` }, stroke: { value: ink } } } });
  return [
    { type: "rule", aria: false, encode: { update: { x: { value: 0 }, x2: { signal: "width" }, y: at(search.budget), stroke: { value: red }, strokeDash: { value: [6, 4] }, strokeWidth: { value: 1.5 } } } },
    { type: "text", aria: false, encode: { update: { x: { signal: "width - 4" }, y: at(search.budget), dy: { value: -6 }, align: { value: "right" }, text: { value: label }, fill: { value: red } } } },
    ...(broken ? [{ type: "rect", aria: false, encode: { update: { x: { value: -6 }, x2: { signal: "width + 6" }, y: { signal: `height * ${STRIP / HEIGHT}` }, y2: { signal: `height * ${(STRIP + 6) / HEIGHT}` }, fill: { value: paper } } } }, slash(0, STRIP), slash(0, STRIP + 6)] : []),
    symbols("stopped-points", "stopped", { shape: { value: "M-1,-1L1,1M-1,1L1,-1" }, size: { value: 34 }, stroke: { value: grey }, strokeWidth: { value: 1.3 }, fill: { value: null } }),
    symbols("other-points", "others", { size: { value: 26 }, fill: { value: grey }, fillOpacity: { value: 0.75 } }),
    { type: "line", aria: false, from: { data: "steps" }, encode: { update: { x, y, interpolate: { value: "step-after" }, stroke: { value: blue }, strokeWidth: { value: 1.5 }, strokeOpacity: { value: 0.7 } } } },
    { type: "rule", aria: false, from: { data: "front" }, encode: { update: { x, y: { scale: "y", field: "low" }, y2: { scale: "y", field: "high" }, stroke: { value: blue }, strokeWidth: { value: 1.3 } } } },
    symbols("named-points", "named", { shape: { field: "shape" }, size: { value: 90 }, fill: { field: "colour" }, stroke: { value: ink } }),
    symbols("front-points", "front", { shape: { field: "shape" }, size: { signal: "datum.shape === 'circle' ? 64 : 95" }, fill: { field: "colour" }, stroke: { value: ink }, strokeWidth: { value: 0.8 } }),
    symbols("winner-ring", "winner", { size: { value: 420 }, fill: { value: null }, stroke: { value: ink }, strokeWidth: { value: 2 } }),
    { type: "text", aria: false, from: { data: "winner" }, encode: { update: { x, y, dx: { value: -14 }, dy: { value: 22 }, align: { value: "right" }, text: { value: "winner" }, fontWeight: { value: 600 } } } },
    symbols("picked-rings", "picked", { size: { value: 200 }, fill: { value: null }, stroke: { value: toned("accent") }, strokeWidth: { value: 2.5 } }),
    { type: "text", aria: false, from: { data: "picked" }, encode: { update: { x, y, dx: { value: 11 }, dy: { value: -9 }, text: { field: "word" }, fontWeight: { value: 700 }, fill: { value: toned("accent") } } } },
  ];
}

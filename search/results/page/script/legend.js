// The signs of the chart of the front, with their names.

const SHAPES = {
  square: "M-5,-5h10v10h-10z",
  "triangle-up": "M0,-6L6,5H-6z",
  "triangle-down": "M0,6L6,-5H-6z",
  diamond: "M0,-7L6,0L0,7L-6,0z",
  cross: "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
};
const circle = (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`;

/** Those signs that are in the chart of a search. */
function legend(search) {
  const origins = new Set(search.trials.map((trial) => trial.origin));
  const [ink, grey, blue] = ["ink", "grey", "blue"].map(toned);
  const named = Object.entries(NAMED).filter(([name]) => origins.has(name));
  return [
    sign("Pareto front, 95 % interval", path("M0,-8V8", null, blue), path(circle(4), blue, ink)),
    sign("other trials", path(circle(3), grey)),
    ...(search.trials.some((trial) => trial.stopped)
      ? [sign("stopped early", path("M-4,-4L4,4M-4,4L4,-4", null, grey))]
      : []),
    ...named.map(([name, [shape, colour]]) => sign(name, path(SHAPES[shape], toned(colour), ink))),
    ...(search.winner === null ? [] : [sign("winner", path(circle(7), null, ink))]),
    sign("chosen (A, B)", path(circle(6), null, toned("accent"))),
  ];
}

/** A path of a sign. */
function path(d, fill, stroke) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const attributes = { d, fill: fill ?? "none", stroke: stroke ?? "none", "stroke-width": 1.3 };
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** A sign with its name. */
function sign(name, ...paths) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  made.setAttribute("viewBox", "-8 -8 16 16");
  made.setAttribute("aria-hidden", "true");
  made.append(...paths);
  return element("li", {}, made, name);
}

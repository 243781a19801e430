// The marks of the front's chart: budget, points of every kind, rings, the winner's label.

const CROSS = "M-1,-1L1,1M-1,1L1,-1";
const LABEL = [176, 58]; // pixels of the winner's label

/** All marks; broken: whether the axis is; fractions: where a trial stands across and down the chart, from 0 to 1. */
function frontMarks(search, shown, broken, fractions) {
  return [
    ...budgetMarks(search, broken),
    ...pointMarks(),
    ...winnerLabel(search, shown, fractions),
    ...ringMarks("winner", 420, toned("ink"), 2),
    ...ringMarks("picked", 200, toned("accent"), 2.5),
  ];
}

/** The budget with its name, and the break of the axis below it. */
function budgetMarks(search, broken) {
  const [red, ink, y] = [toned("red"), toned("ink"), { scale: "y", value: search.budget }];
  const text = `budget, +${Number(search.budget.toPrecision(6))} ${search.metric.unit}`;
  const line = { x: 0, x2: signal("width"), y, stroke: red, strokeDash: [6, 4], strokeWidth: 1.5 };
  const found = [
    mark("rule", null, line),
    mark("text", null, { x: signal("width - 4"), y: { ...y, offset: -6 }, align: "right", text, fill: red }),
  ];
  if (!broken) return found;
  const [above, below] = [STRIP / HEIGHT, (STRIP + GAP) / HEIGHT].map((share) => `height * ${share}`);
  const slash = (edge) =>
    mark("rule", null, { x: -5, x2: 5, y: signal(`${edge} + 3`), y2: signal(`${edge} - 3`), stroke: ink });
  const gap = { x: -6, x2: signal("width + 6"), y: signal(above), y2: signal(below), fill: toned("paper") };
  return [...found, mark("rect", null, gap), slash(above), slash(below)];
}

/** Trials: those that were stopped, others, the front with its line and intervals, the named ones. */
function pointMarks() {
  const [x, y] = [field("x", "x"), field("y", "y")];
  const [ink, grey, blue] = [toned("ink"), toned("grey"), toned("blue")];
  const named = { x, y, shape: { field: "shape" }, fill: { field: "colour" }, stroke: ink };
  const line = { x, y, interpolate: "step-after", stroke: blue, strokeWidth: 1.5, strokeOpacity: 0.7 };
  const interval = { x, y: field("y", "low"), y2: field("y", "high"), stroke: blue, strokeWidth: 1.3 };
  const size = signal("datum.shape === 'circle' ? 64 : 95");
  return [
    mark("symbol", "stopped", { x, y, shape: CROSS, size: 34, stroke: grey, strokeWidth: 1.3, fill: null }),
    mark("symbol", "others", { x, y, size: 26, fill: grey, fillOpacity: 0.75 }),
    mark("line", "steps", line),
    mark("rule", "front", interval),
    mark("symbol", "named", { ...named, size: 90 }),
    mark("symbol", "front", { ...named, size, strokeWidth: 0.8 }, "front-points"),
  ];
}

/** Rings around the rows of some data, with their words. */
function ringMarks(data, size, colour, strokeWidth) {
  const [x, y] = [field("x", "x"), field("y", "y")];
  const word = {
    x: { ...x, offset: 11 },
    y: { ...y, offset: -9 },
    text: { field: "word" },
    fontWeight: 700,
    fill: colour,
  };
  return [mark("symbol", data, { x, y, size, fill: null, stroke: colour, strokeWidth }), mark("text", data, word)];
}

/** Words on the winner at the end of a line, where they cover the fewest points. */
function winnerLabel(search, shown, fractions) {
  const winner = search.trial(search.winner);
  if (!shown.includes(winner)) return [];
  const text = [
    `winner: trial ${winner.trial}`,
    `${winner.compression.toFixed(2)}×, ${sized(winner.bytes)}`,
    `${interval(winner.increase, winner.spread, search.metric)} ${search.metric.unit}`,
  ];
  const place = emptyPlace(shown.map(fractions), fractions(winner));
  const [x, y] = [signal(`width * ${place.x}`), signal(`height * ${place.y}`)];
  const [xc, yc, width, height] = [x, y, ...LABEL];
  const [own, soft] = [{ x: field("x", "x"), y: field("y", "y") }, toned("soft")];
  const words = { x, y: { ...y, offset: -16 }, align: "center", baseline: "middle", lineHeight: 16, text };
  return [
    mark("rule", "winner", { ...own, x2: x, y2: y, stroke: soft }),
    mark("rect", null, { xc, yc, width, height, cornerRadius: 5, fill: toned("paper"), stroke: soft }),
    mark("text", null, words),
  ];
}

/** Of some places of the chart the one whose label covers the fewest points, then the nearest to its own point. */
function emptyPlace(points, own) {
  const places = [0.2, 0.4, 0.6, 0.8].flatMap((y) => [0.82, 0.65, 0.48, 0.3, 0.15].map((x) => ({ x, y })));
  const covered = (at) => points.filter((one) => Math.abs(one.x - at.x) < 0.13 && Math.abs(one.y - at.y) < 0.12).length;
  const worse = (at) => 10 * covered(at) + Math.hypot(at.x - own.x, at.y - own.y);
  return places.reduce((best, at) => (worse(at) < worse(best) ? at : best));
}

// The smaller charts: hypervolume over evaluations, and the increase by position in the window.

/** Draw a chart in a place; scales: x and y, titles of the axes likewise. */
async function drawn(place, label, titles, { data, x, y, marks }) {
  const spec = {
    $schema: "https://vega.github.io/schema/vega/v6.json",
    width: place.clientWidth,
    height: 220,
    padding: 4,
    autosize: { type: "fit", contains: "padding" },
    background: null,
    description: label,
    config: chartConfig(),
    data: [{ name: "rows", values: data }],
    scales: [
      { name: "x", domain: x, range: "width" },
      { name: "y", domain: y, zero: true, nice: true, range: "height" },
    ],
    axes: [
      { scale: "x", orient: "bottom", title: titles.x, tickCount: 8, format: "~d", labelOverlap: "parity" },
      { scale: "y", orient: "left", title: titles.y, grid: true, tickCount: 5, format: ".6~g" },
    ],
    marks,
  };
  const view = new vega.View(vega.parse(spec), { renderer: "svg", container: place, hover: false });
  await view.runAsync();
}

/** The hypervolume after so many finished trials. */
function growthChart(place, search) {
  const trials = search.trials.length;
  const data = search.growth.map(([finished, volume]) => ({ finished, volume }));
  const last = data.at(-1)?.volume ?? 0;
  if (data.length && data.at(-1).finished < trials) data.push({ finished: trials, volume: last });
  const [x, y] = [field("x", "finished"), field("y", "volume")];
  const line = { x, y, interpolate: "step-after", stroke: toned("blue"), strokeWidth: 2 };
  return drawn(
    place,
    `Hypervolume over ${trials} finished trials, at the end ${last.toPrecision(5)}`,
    { x: "finished trials", y: "hypervolume" },
    { data, x: [0, Math.max(1, trials)], y: [0, last || 1], marks: [mark("line", "rows", line)] },
  );
}

/** The increase over FP32 by the position of the predicted token, with 95 % intervals. */
function driftChart(place, measured) {
  const data = measured.buckets.map((bucket) => ({
    first: bucket.first,
    last: bucket.last,
    middle: (bucket.first + bucket.last) / 2,
    increase: bucket.increase_percent,
    low: bucket.increase_percent - 1.96 * bucket.stderr_percent,
    high: bucket.increase_percent + 1.96 * bucket.stderr_percent,
  }));
  const stroke = toned("blue");
  const [x, y] = [field("x", "middle"), field("y", "increase")];
  const zero = { scale: "y", value: 0 };
  const said = data.map((row) => `${row.first} to ${row.last}: ${signed(row.increase, 3)} %`);
  return drawn(
    place,
    `Increase by position in windows of ${measured.length} tokens. ${said.join("; ")}`,
    { x: `position of the predicted token, of ${measured.length}`, y: "perplexity increase (%)" },
    {
      data,
      x: [0, measured.length],
      y: [Math.min(0, ...data.map((row) => row.low)), Math.max(0, ...data.map((row) => row.high))],
      marks: [
        mark("rule", null, { x: 0, x2: signal("width"), y: zero, stroke: toned("ink") }),
        mark("rule", "rows", { x, y: field("y", "low"), y2: field("y", "high"), stroke }),
        mark("rule", "rows", { x: field("x", "first"), x2: field("x", "last"), y, stroke }),
        mark("symbol", "rows", { x, y, size: 50, fill: stroke }),
      ],
    },
  );
}

// The smaller charts: hypervolume over evaluations, and the increase by position in the window.

/** A chart in a place, drawn at once. */
async function drawn(place, spec) {
  const view = new vega.View(vega.parse(spec), { renderer: "svg", container: place, hover: false });
  await view.runAsync();
}

function chart(place, label, title, parts) {
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json",
    width: place.clientWidth, height: 220, padding: 4, autosize: { type: "fit", contains: "padding" }, background: null,
    description: label, config: chartConfig(), ...parts,
    axes: [
      { scale: "x", orient: "bottom", title: title.x, tickCount: 8, format: "~d", labelOverlap: "parity" },
      { scale: "y", orient: "left", title: title.y, grid: true, tickCount: 5, format: "~g" },
    ],
  };
}

/** The hypervolume after so many finished trials. */
function growthChart(place, search) {
  const steps = search.growth.map(([finished, volume]) => ({ finished, volume }));
  const last = steps.at(-1);
  if (last && last.finished < search.trials.length) steps.push({ finished: search.trials.length, volume: last.volume });
  const [x, y] = [{ scale: "x", field: "finished" }, { scale: "y", field: "volume" }];
  return drawn(place, chart(place, `Hypervolume over ${search.trials.length} finished trials, at the end ${last?.volume.toPrecision(5) ?? 0}`, {
    x: "finished trials", y: `hypervolume (${search.hypervolumeUnit})`,
  }, {
    data: [{ name: "steps", values: steps }],
    scales: [
      { name: "x", domain: [0, Math.max(1, search.trials.length)], range: "width" },
      { name: "y", domain: { data: "steps", field: "volume" }, zero: true, nice: true, range: "height" },
    ],
    marks: [{ type: "line", from: { data: "steps" }, encode: { update: { x, y, interpolate: { value: "step-after" }, stroke: { value: toned("blue") }, strokeWidth: { value: 2 } } } }],
  }));
}

/** The increase over FP32 by the position of the predicted token, with 95 % intervals. */
function driftChart(place, measured) {
  const rows = measured.buckets.map((bucket) => ({
    first: bucket.first, last: bucket.last, middle: (bucket.first + bucket.last) / 2, increase: bucket.increase_percent,
    low: bucket.increase_percent - 1.96 * bucket.stderr_percent, high: bucket.increase_percent + 1.96 * bucket.stderr_percent,
  }));
  const blue = { value: toned("blue") };
  const [x, y] = [{ scale: "x", field: "middle" }, { scale: "y", field: "increase" }];
  return drawn(place, chart(place, `Increase by position in windows of ${measured.length} tokens`, {
    x: `position of the predicted token, of ${measured.length}`, y: "perplexity increase (%)",
  }, {
    data: [{ name: "rows", values: rows }],
    scales: [
      { name: "x", domain: [0, measured.length], range: "width" },
      { name: "y", domain: [Math.min(0, ...rows.map((row) => row.low)), Math.max(0, ...rows.map((row) => row.high))], nice: true, range: "height" },
    ],
    marks: [
      { type: "rule", encode: { update: { x: { value: 0 }, x2: { signal: "width" }, y: { scale: "y", value: 0 }, stroke: { value: toned("ink") } } } },
      { type: "rule", from: { data: "rows" }, encode: { update: { x, y: { scale: "y", field: "low" }, y2: { scale: "y", field: "high" }, stroke: blue } } },
      { type: "rule", from: { data: "rows" }, encode: { update: { x: { scale: "x", field: "first" }, x2: { scale: "x", field: "last" }, y, stroke: blue } } },
      { type: "symbol", from: { data: "rows" }, encode: { update: { x, y, size: { value: 50 }, fill: blue } } },
    ],
  }));
}

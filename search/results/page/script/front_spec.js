// What the chart of the front holds, as Vega reads it.

const NAMED = {
  "uniform fp16": ["square", "green"],
  conservative: ["triangle-up", "orange"],
  aggressive: ["triangle-down", "red"],
  "uniform int8": ["diamond", "pink"],
  cumulative: ["cross", "sky"],
};

/** The chart of the trials that fit it. No text of the study but its target comes into it: points are numbers. */
function frontSpec(search, shown, logarithmic, width) {
  const [across, up] = [compressions(shown, logarithmic.compression), increases(search, shown, logarithmic.increase)];
  const fractions = (trial) => ({ x: across.fraction(trial.compression), y: up.fraction(trial.increase) });
  const target = search.target ? ` as ${search.target}` : "";
  return {
    $schema: "https://vega.github.io/schema/vega/v6.json",
    width,
    height: HEIGHT,
    padding: 4,
    autosize: { type: "fit", contains: "padding" },
    background: null,
    data: frontData(search, shown),
    scales: [
      { name: "x", zero: false, nice: false, ...across.scale, range: [0, signal("width")] },
      {
        name: "y",
        zero: false,
        nice: false,
        ...up.scale,
        range: up.shares.map((share) => signal(`height * ${share}`)),
      },
    ],
    axes: [
      {
        ...{ scale: "x", orient: "bottom", grid: true, tickCount: 8, labelOverlap: "parity", format: ".6~g" },
        title: `compression over FP32 (×), larger is smaller on disk${target}`,
      },
      {
        ...{ scale: "y", orient: "left", grid: true, values: up.values, labelOverlap: "greedy", format: ".6~g" },
        title: `${search.metric.axis}, lower is better`,
      },
    ],
    marks: frontMarks(search, shown, up.broken, fractions),
    config: chartConfig(),
  };
}

/** The rows of every kind of mark. */
function frontData(search, shown) {
  const row = (trial) => ({
    x: trial.compression,
    y: trial.increase,
    low: trial.increase - trial.spread,
    high: trial.increase + trial.spread,
    shape: NAMED[trial.origin]?.[0] ?? "circle",
    colour: toned(NAMED[trial.origin]?.[1] ?? "blue"),
  });
  const onFront = search.front.map((number) => search.trial(number)).filter((trial) => shown.includes(trial));
  const others = shown.filter((trial) => !search.onFront.has(trial.trial));
  const kinds = {
    front: onFront,
    // of three objectives, the line joins what is on the front for size and quality alone
    steps: onFront.filter((trial, at) => onFront.slice(0, at).every((one) => one.increase > trial.increase)),
    named: others.filter((trial) => NAMED[trial.origin] && !trial.stopped),
    others: others.filter((trial) => !NAMED[trial.origin] && !trial.stopped),
    stopped: others.filter((trial) => trial.stopped),
    winner: shown.filter((trial) => trial.trial === search.winner),
    picked: [],
  };
  return Object.entries(kinds).map(([name, trials]) => ({ name, values: trials.map(row) }));
}

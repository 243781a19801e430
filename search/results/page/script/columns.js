// Columns of the tables of trials and of sensitivities.

/** A column of texts, sorted by them. */
const words = (key, head, text) => ({ key, head, value: (row) => text(row) || null, text });

/** A column of numbers; `more` may say which way they are sorted first, or what they mean. */
const numbers = (key, head, value, text, more = {}) => ({
  ...{ key, head, value, number: true, ...more },
  text: (row) => (value(row) === null ? "–" : text(row)),
});

const FALLING = { descending: true };

/** A column of whole numbers, the largest first. */
const counts = (key, head, value) => numbers(key, head, value, (row) => counted(value(row)), FALLING);

/** The columns of the trials; pressed: which are A and B; press(trial, action): what their buttons do. */
function trialColumns(search, pressed, press) {
  const { metric } = search;
  const button = (row, action, at, more, text) => {
    const click = () => press(row, action);
    const state = String(pressed()[at] === row);
    return element(
      "button",
      { type: "button", "aria-pressed": state, [`data-${action}`]: row.trial, click, ...more },
      text,
    );
  };
  const timed = search.trials.some((trial) => trial.latency !== null);
  const select = (row) => button(row, "select", 0, { class: "link" }, `trial ${row.trial}`);
  const compare = (row) => button(row, "compare", 1, { "aria-label": `compare with trial ${row.trial}` }, "compare");
  return [
    { ...numbers("trial", "trial", (row) => row.trial), cell: select },
    numbers(
      "compression",
      "compression",
      (row) => row.compression,
      (row) => `${row.compression.toFixed(3)}×`,
      FALLING,
    ),
    numbers(
      "bytes",
      "bytes",
      (row) => row.bytes,
      (row) => counted(row.bytes),
    ),
    numbers(
      "perplexity",
      "perplexity",
      (row) => row.perplexity,
      (row) => row.perplexity.toFixed(4),
    ),
    numbers(
      "increase",
      `increase ± 95 %, ${metric.unit}`,
      (row) => row.increase,
      (row) => interval(row.increase, row.spread, metric),
    ),
    ...(timed
      ? [
          numbers(
            "latency",
            "latency, ms",
            (row) => row.latency,
            (row) => (1e3 * row.latency).toFixed(3),
          ),
        ]
      : []),
    counts("windows", "windows", (row) => row.windows),
    words("origin", "origin", (row) => row.origin),
    words("roles", "is", (row) => search.roles(row).join(", ")),
    { key: "compare", head: "", cell: compare },
  ];
}

/** Which trials a table may be limited to. */
function trialKinds(search) {
  return {
    "all trials": () => true,
    "the front": (row) => search().onFront.has(row.trial),
    "within the budget": (row) => row.increase !== null && row.increase <= search().budget && !row.stopped,
    "stopped early": (row) => Boolean(row.stopped),
  };
}

/** The columns of the sensitivities. */
function sensitivityColumns(search) {
  const { metric } = search;
  const each = (row) => (row.saved > 0 && row.cost !== null ? (1e3 * row.cost) / row.saved : null);
  const alone = { ...FALLING, title: "what lowering it alone costs, all others at their widest" };
  const among = { ...FALLING, title: "what having it low rather than raised costs, all others at their lowest" };
  const group = (row) => (row.members.length > 1 ? ` (${row.members.length} components)` : "");
  return [
    words("component", "component", (row) => row.component + group(row)),
    words("precision", "lowered to", (row) => `${row.from} → ${row.precision}`),
    counts("saved", "bytes saved", (row) => row.saved),
    numbers(
      "cost",
      `cost, ${metric.unit}`,
      (row) => row.cost,
      (row) => interval(row.cost, row.spread, metric),
      alone,
    ),
    numbers("each", `cost per kB saved, ${metric.unit}`, each, (row) => signed(each(row), 5 + metric.digits), FALLING),
    numbers(
      "back",
      `cost among the lowest, ${metric.unit}`,
      (row) => row.back,
      (row) => interval(row.back, row.backSpread, metric),
      among,
    ),
  ];
}

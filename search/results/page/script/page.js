// The page: what is chosen, which charts and tables show it, and the server that is asked again while a search runs.

const byId = (id) => document.getElementById(id);
const contentOf = (from) => JSON.parse(from.getElementById("content").textContent);

class Page {
  constructor(content) {
    this.search = new Search(content);
    const first = this.search.trial(this.search.winner) ?? this.search.trial(this.search.front[0]) ?? this.search.trials[0] ?? null;
    this.picked = [first, null];
    this.tooltip = new Tooltip(byId("tooltip"));
    this.actions = { select: (trial) => this.pick(trial, this.picked[1]), compare: (trial) => this.pick(this.picked[0], trial) };
    this.chart = new FrontChart(byId("front-chart"), this.tooltip, this.actions);
    for (const id of ["log-increase", "log-compression"]) byId(id).addEventListener("change", () => this.drawCharts());
    byId("swap").addEventListener("click", () => this.pick(this.picked[1], this.picked[0]));
    byId("alone").addEventListener("click", () => this.pick(this.picked[0], null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawCharts());
    let waiting = 0;
    new ResizeObserver(() => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(() => this.resized());
    }).observe(byId("front-chart"));
    this.trials = new SortedTable(byId("trials-table"), this.trialTable());
    this.sensitivities = new SortedTable(byId("sensitivities-table"), this.sensitivityTable());
  }

  /** Show everything of the search. */
  async show() {
    this.trials.show(this.search.trials);
    this.sensitivities.show(this.search.sensitivities);
    this.showPicked();
    await this.drawCharts();
  }

  resized() {
    const width = byId("front-chart").clientWidth;
    if (this.width !== undefined && width !== this.width) this.drawCharts();
  }

  async drawCharts() {
    this.width = byId("front-chart").clientWidth;
    const scales = { increase: byId("log-increase").checked, compression: byId("log-compression").checked };
    await this.chart.draw(this.search, this.picked, scales);
    byId("legend").replaceChildren(...legend(this.search));
    byId("growth-chart").replaceChildren();
    await growthChart(byId("growth-chart"), this.search);
    await this.drawDrift();
  }

  async drawDrift() {
    byId("drift-charts").replaceChildren();
    byId("drift").hidden = this.search.drift.length === 0;
    for (const found of this.search.drift) {
      for (const measured of [found.windows, found.long].filter((one) => one)) {
        const place = element("div", { class: "chart" });
        const said = measured.grows ? "the increase grows along the window" : "no growth that can be told from noise";
        const caption = element("figcaption", {}, `Trial ${found.trial}, ${found.path}: ${measured.windows} windows of ${measured.length} tokens; ${said}.`);
        byId("drift-charts").append(element("figure", {}, caption, place));
        await driftChart(place, measured);
      }
    }
  }

  /** Choose A, and B beside it or null. */
  async pick(one, two) {
    this.picked = [one, two === one ? null : two];
    this.showPicked();
    this.trials.show(this.search.trials);
    await this.chart.pick(this.picked);
    const [a, b] = this.picked;
    byId("told").textContent = b ? `Comparing trial ${a.trial} with trial ${b.trial}` : a ? `Selected trial ${a.trial}` : "";
  }

  showPicked() {
    const [one, two] = this.picked;
    byId("compared").hidden = !two;
    if (!one) return;
    byId("difference").textContent = two ? difference(this.search, one, two) : "";
    const panels = [mapPanel(this.search, "A", one, two), ...(two ? [mapPanel(this.search, "B", two, one)] : [])];
    byId("maps").replaceChildren(...panels);
    byId("maps").classList.toggle("two", Boolean(two));
    const sort = this.components?.sort ?? { key: "bytes", descending: true };
    this.components = new SortedTable(byId("components-table"), {
      caption: two ? `Components in trials ${one.trial} and ${two.trial}` : `Components in trial ${one.trial}`,
      columns: componentColumns(this.search, Boolean(two)),
      sort: ["theirs", "theirBytes"].includes(sort.key) && !two ? { key: "bytes", descending: true } : sort,
      words: (row) => `${row.component.name} ${row.component.kind} ${row.held} ${row.theirs ?? ""}`,
      kinds: two ? { all: () => true, "only differences": (row) => row.held !== row.theirs } : {},
    });
    this.components.show(componentRows(this.search, one, two));
  }

  trialTable() {
    const { metric } = this.search;
    const chosen = (row) => ({ class: "link", type: "button", "aria-pressed": String(row === this.picked[0]), click: () => this.again(row, "select") });
    const beside = (row) => ({ type: "button", "aria-pressed": String(row === this.picked[1]), click: () => this.again(row, "compare") });
    const timed = this.search.trials.some((trial) => trial.latency !== null);
    return {
      caption: "Trials",
      columns: [
        { key: "trial", head: "trial", number: true, value: (row) => row.trial, cell: (row) => element("button", { ...chosen(row), "data-select": row.trial }, `trial ${row.trial}`) },
        { key: "compression", head: "compression", number: true, descending: true, value: (row) => row.compression, text: (row) => `${row.compression.toFixed(3)}×` },
        { key: "bytes", head: "bytes", number: true, value: (row) => row.bytes, text: (row) => counted(row.bytes) },
        { key: "perplexity", head: "perplexity", number: true, value: (row) => row.perplexity, text: (row) => row.perplexity.toFixed(4) },
        { key: "increase", head: `increase ± 95 %, ${metric.unit}`, number: true, value: (row) => row.increase, text: (row) => interval(row.increase, row.spread, metric) },
        ...(timed ? [{ key: "latency", head: "latency, ms", number: true, value: (row) => row.latency, text: (row) => (row.latency === null ? "–" : (1e3 * row.latency).toFixed(3)) }] : []),
        { key: "windows", head: "windows", number: true, descending: true, value: (row) => row.windows, text: (row) => counted(row.windows) },
        { key: "origin", head: "from", value: (row) => row.origin, text: (row) => row.origin },
        { key: "roles", head: "is", value: (row) => this.search.roles(row).join(", ") || null, text: (row) => this.search.roles(row).join(", ") },
        { key: "compare", head: "", cell: (row) => element("button", { ...beside(row), "data-compare": row.trial, "aria-label": `compare with trial ${row.trial}` }, "compare") },
      ],
      sort: { key: "bytes", descending: false },
      words: (row) => [row.trial, row.origin, ...this.search.roles(row), ...this.search.summary(row)].join(" "),
      kinds: {
        "all trials": () => true,
        "the front": (row) => this.search.onFront.has(row.trial),
        "within the budget": (row) => row.increase !== null && row.increase <= this.search.budget && !row.stopped,
        "stopped early": (row) => Boolean(row.stopped),
      },
      marked: (row) => (row === this.picked[0] ? "a" : row === this.picked[1] ? "b" : null),
    };
  }

  /** Pick from the table, where the pressed button keeps the focus although the table is drawn anew. */
  async again(row, action) {
    await this.actions[action](row);
    byId("trials-table").querySelector(`[data-${action}="${row.trial}"]`)?.focus();
  }

  sensitivityTable() {
    const { metric } = this.search;
    const each = (row) => (row.saved > 0 && row.cost !== null ? (1e3 * row.cost) / row.saved : null);
    const digits = 5 + metric.digits;
    return {
      caption: "Sensitivities",
      columns: [
        { key: "component", head: "component", value: (row) => row.component, text: (row) => row.component + (row.members.length > 1 ? ` (${row.members.length} components)` : "") },
        { key: "precision", head: "lowered to", value: (row) => row.precision, text: (row) => `${row.from} → ${row.precision}` },
        { key: "saved", head: "bytes saved", number: true, descending: true, value: (row) => row.saved, text: (row) => counted(row.saved) },
        { key: "cost", head: `cost, ${metric.unit}`, number: true, descending: true, title: "what lowering it alone costs, all others at their widest", value: (row) => row.cost, text: (row) => interval(row.cost, row.spread, metric) },
        { key: "each", head: `cost per kB saved, ${metric.unit}`, number: true, descending: true, value: each, text: (row) => (each(row) === null ? "–" : signed(each(row), digits)) },
        { key: "back", head: `cost among the lowest, ${metric.unit}`, number: true, descending: true, title: "what having it low rather than raised costs, all others at their lowest", value: (row) => row.back, text: (row) => (row.back === null ? "–" : interval(row.back, row.backSpread, metric)) },
      ],
      sort: { key: "cost", descending: true },
      words: (row) => `${row.component} ${row.precision} ${row.members.join(" ")}`,
    };
  }

  /** Take over what the server says now; what is chosen, filtered and sorted stays. */
  async renew(from) {
    for (const part of document.querySelectorAll("[data-live]")) {
      const now = from.getElementById(part.id);
      if (now) part.replaceChildren(...now.childNodes);
    }
    this.search = new Search(contentOf(from));
    this.picked = this.picked.map((trial) => (trial ? this.search.trial(trial.trial) : null));
    this.picked[0] ??= this.search.trial(this.search.front[0]);
    await this.show();
  }
}

/** Signs of the chart with their names: those that are in it. */
function legend(search) {
  const origins = new Set(search.trials.map((trial) => trial.origin));
  const svg = (paths) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    made.setAttribute("viewBox", "-8 -8 16 16");
    made.setAttribute("aria-hidden", "true");
    for (const [d, fill, stroke] of paths) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      for (const [key, value] of Object.entries({ d, fill: fill ?? "none", stroke: stroke ?? "none", "stroke-width": 1.3 })) path.setAttribute(key, value);
      made.append(path);
    }
    return made;
  };
  const circle = (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`;
  const shapes = { square: "M-5,-5h10v10h-10z", "triangle-up": "M0,-6L6,5H-6z", "triangle-down": "M0,6L6,-5H-6z", diamond: "M0,-7L6,0L0,7L-6,0z", cross: "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z" };
  const [ink, grey, blue] = ["ink", "grey", "blue"].map(toned);
  const entries = [
    ["Pareto front, 95 % interval", [["M0,-8V8", null, blue], [circle(4), blue, ink]]],
    ["other trials", [[circle(3), grey]]],
    ...(search.trials.some((trial) => trial.stopped) ? [["stopped early", [["M-4,-4L4,4M-4,4L4,-4", null, grey]]]] : []),
    ...Object.entries(NAMED).filter(([name]) => origins.has(name)).map(([name, [shape, colour]]) => [name, [[shapes[shape], toned(colour), ink]]]),
    ...(search.winner === null ? [] : [["winner", [[circle(7), null, ink]]]]),
    ["chosen (A, B)", [[circle(6), null, toned("accent")]]],
  ];
  return entries.map(([name, paths]) => element("li", {}, svg(paths), name));
}

/** Ask the server again every few seconds; nothing is drawn anew where nothing is new. */
function follow(page) {
  let known = document.documentElement.dataset.version;
  const ask = async () => {
    try {
      const answer = await fetch("/", { headers: { "If-None-Match": known } });
      if (answer.status === 200) {
        known = answer.headers.get("ETag");
        await page.renew(new DOMParser().parseFromString(await answer.text(), "text/html"));
      }
      byId("served").textContent = "";
    } catch {
      byId("served").textContent = "The server does not answer; this is what it said last.";
    }
    setTimeout(ask, 3000);
  };
  setTimeout(ask, 3000);
}

const page = new Page(contentOf(document));
page.show().then(() => {
  document.documentElement.dataset.ready = "";
  if (document.documentElement.dataset.version) follow(page);
});

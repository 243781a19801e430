// The page: what is chosen, and which charts and tables show it.

const byId = (id) => document.getElementById(id);
const contentOf = (from) => JSON.parse(from.getElementById("content").textContent);

class Page {
  constructor(content) {
    this.search = new Search(content);
    this.picked = [this.first(), null];
    this.actions = {
      select: (trial) => this.pick(trial, this.picked[1]),
      compare: (trial) => this.pick(this.picked[0], trial === this.picked[1] ? null : trial),
    };
    this.chart = new FrontChart(byId("front-chart"), new Tooltip(byId("tooltip")), this.actions);
    this.trials = new SortedTable(byId("trials-table"), {
      caption: "Trials",
      columns: trialColumns(
        this.search,
        () => this.picked,
        (row, action) => this.pressed(row, action),
      ),
      sort: { key: "bytes", descending: false },
      words: (row) => [row.trial, row.origin, ...this.search.roles(row), ...this.search.summary(row)].join(" "),
      kinds: trialKinds(() => this.search),
      marked: (row) => (row === this.picked[0] ? "a" : row === this.picked[1] ? "b" : null),
    });
    this.sensitivities = new SortedTable(byId("sensitivities-table"), {
      caption: "Sensitivities",
      columns: sensitivityColumns(this.search),
      sort: { key: "cost", descending: true },
      words: (row) => `${row.component} ${row.precision} ${row.members.join(" ")}`,
    });
    this.listen();
  }

  /** What is chosen at first: the winner, else the smallest of the front, else any. */
  first() {
    const { winner, front, trials } = this.search;
    return this.search.trial(winner) ?? this.search.trial(front[0]) ?? trials[0] ?? null;
  }

  listen() {
    for (const id of ["log-increase", "log-compression"]) byId(id).addEventListener("change", () => this.drawCharts());
    byId("swap").addEventListener("click", () => this.pick(this.picked[1], this.picked[0]));
    byId("alone").addEventListener("click", () => this.pick(this.picked[0], null));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.drawCharts());
    let waiting = 0;
    const resized = new ResizeObserver(() => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(() => byId("front-chart").clientWidth !== this.width && this.drawCharts());
    });
    resized.observe(byId("front-chart"));
  }

  /** Show everything of the search. */
  async show() {
    this.trials.show(this.search.trials);
    this.sensitivities.show(this.search.sensitivities);
    this.showPicked();
    await this.drawCharts();
  }

  async drawCharts() {
    this.width = byId("front-chart").clientWidth;
    const logarithmic = { increase: byId("log-increase").checked, compression: byId("log-compression").checked };
    await this.chart.draw(this.search, this.picked, logarithmic);
    const outside = this.search.trials.length - this.chart.shown.length;
    byId("outside").textContent = outside
      ? `${counted(outside)} worse ${outside === 1 ? "trial is" : "trials are"} above the chart.`
      : "";
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
        const of = `Trial ${found.trial}, ${found.path}: ${measured.windows} windows of ${measured.length} tokens`;
        byId("drift-charts").append(element("figure", {}, element("figcaption", {}, `${of}; ${said}.`), place));
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
    byId("told").textContent = b ? `Comparing trial ${a.trial} with trial ${b.trial}` : `Chosen: trial ${a.trial}`;
  }

  /** Pick from the table, where the pressed button keeps the focus although the table is drawn anew. */
  async pressed(row, action) {
    await this.actions[action](row);
    byId("trials-table").querySelector(`[data-${action}="${row.trial}"]`)?.focus();
  }

  showPicked() {
    const [one, two] = this.picked;
    byId("compared").hidden = !two;
    byId("components").hidden = !one;
    if (!one) return;
    byId("difference").textContent = two ? difference(this.search, one, two) : "";
    const panels = [mapPanel(this.search, "A", one, two), ...(two ? [mapPanel(this.search, "B", two, one)] : [])];
    byId("maps").replaceChildren(...panels);
    const table = new SortedTable(byId("components-table"), {
      caption: two ? `Components in trials ${one.trial} and ${two.trial}` : `Components in trial ${one.trial}`,
      columns: componentColumns(this.search, Boolean(two)),
      sort: { key: "bytes", descending: true },
      words: (row) => `${row.component.name} ${row.component.kind} ${row.held} ${row.theirs ?? ""}`,
      kinds: two ? { all: () => true, "only differences": (row) => row.held !== row.theirs } : {},
    });
    table.show(componentRows(this.search, one, two));
  }

  /** Take over what a server says now; what is chosen, filtered and sorted stays. */
  async renew(from) {
    for (const part of document.querySelectorAll("[data-live]")) {
      part.replaceChildren(...from.getElementById(part.id).childNodes);
    }
    this.search = new Search(contentOf(from));
    this.picked = this.picked.map((trial) => (trial ? this.search.trial(trial.trial) : null));
    this.picked[0] ??= this.first();
    await this.show();
  }
}

const page = new Page(contentOf(document));
page.show().then(() => {
  document.documentElement.dataset.ready = "";
  if (document.documentElement.dataset.version) follow(page);
});

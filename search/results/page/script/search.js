// A search: its trials, their maps, and what can be said of each.

class Search {
  constructor(content) {
    Object.assign(this, content);
    this.byNumber = new Map(this.trials.map((trial) => [trial.trial, trial]));
    this.onFront = new Set(this.front);
    this.colourOf = new Map(this.precisions.map((precision) => [precision.name, precision.colour]));
    this.costs = new Map();
    for (const row of this.sensitivities) {
      for (const member of row.members) this.costs.set(JSON.stringify([member, row.precision]), row);
    }
  }

  trial(number) {
    return this.byNumber.get(number) ?? null;
  }

  /** The precision of every component, in their order. */
  map(trial) {
    return trial.map.split(" ").map((index) => this.precisions[index].name);
  }

  /** What lowering a component (or its group) alone costs, null where it was not measured. */
  cost(component, precision) {
    return this.costs.get(JSON.stringify([component, precision])) ?? null;
  }

  /** What a trial is besides its number. */
  roles(trial) {
    return [
      trial.trial === this.winner ? "winner" : null,
      this.onFront.has(trial.trial) ? "on the front" : null,
      trial.trial === this.knee ? "knee" : null,
      trial.trial === this.fastest ? "fastest" : null,
      trial.stopped ? `stopped early: ${trial.stopped}` : null,
    ].filter((role) => role !== null);
  }

  /** A map in short: for every kind of component, how many are at which precision. */
  summary(trial) {
    const kinds = new Map();
    this.map(trial).forEach((precision, at) => {
      const kind = this.components[at].kind;
      if (!kinds.has(kind)) kinds.set(kind, new Map());
      kinds.get(kind).set(precision, (kinds.get(kind).get(precision) ?? 0) + 1);
    });
    return [...kinds].map(([kind, held]) => {
      const said = [...held].map(([precision, count]) => (count === 1 ? precision : `${precision} ×${count}`));
      return `${kind} ${said.join(", ")}`;
    });
  }

  /** Everything about a trial in lines: what is shown on hover and read aloud on focus. */
  lines(trial) {
    const roles = this.roles(trial);
    return [
      `Trial ${trial.trial}${roles.length ? `: ${roles.join(", ")}` : ""}`,
      `${trial.compression.toFixed(3)}× smaller, ${counted(trial.bytes)} bytes`,
      `${interval(trial.increase, trial.spread, this.metric)} ${this.metric.unit} (95 %)`,
      `perplexity ${trial.perplexity.toFixed(4)} on ${trial.windows} windows`,
      ...(trial.latency === null ? [] : [`${(1e3 * trial.latency).toFixed(3)} ms predicted`]),
      `origin: ${trial.origin || "unknown"}`,
    ];
  }

  /** The command that writes a trial's map out. */
  command(trial) {
    return trial.trial === this.winner ? this.exportWinner : this.export.join(String(trial.trial));
  }

  /** A trial's map as a TOML file, which `ssm-mp convert --map` reads. */
  toml(trial) {
    const quoted = (text) => JSON.stringify(text).replaceAll("\u007f", "\\u007f");
    const rows = this.map(trial).map((held, at) => `${quoted(this.components[at].name)} = ${quoted(held)}`);
    return `${rows.join("\n")}\n`;
  }
}

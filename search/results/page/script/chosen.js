// What is chosen: one map, or two side by side; each component's bytes and sensitivity, the map as TOML, the command.

/** A text in a box that can be selected, and a button that copies it and says so; wrap: "soft" or "off". */
function copied(label, text, rows, wrap) {
  const box = element("textarea", { readonly: true, rows, "aria-label": label, spellcheck: "false", wrap });
  box.value = text;
  const said = element("span", { role: "status", class: "said" });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      box.select(); // a page without the right to the clipboard: the browser's own command
      document.execCommand("copy");
    }
    said.textContent = "copied";
    setTimeout(() => said.replaceChildren(), 4000);
  };
  const button = element("button", { type: "button", click: copy, class: "copy" }, `Copy ${label}`);
  return element("div", { class: "copied" }, element("div", { class: "controls" }, button, said), box);
}

/** The figures of a trial, a line each. */
function figures(search, word, trial) {
  const [head, ...lines] = search.lines(trial);
  return element(
    "div",
    { class: "figures" },
    element("h3", {}, element("span", { class: "word" }, word), head),
    element("ul", {}, ...lines.map((line) => element("li", {}, line))),
  );
}

/** A whole map: figures, picture, command, TOML. */
function mapPanel(search, word, trial, other) {
  return element(
    "article",
    { class: "map", "aria-label": `Map ${word}: trial ${trial.trial}` },
    figures(search, word, trial),
    allocation(search, trial, other),
    copied("the export command", search.command(trial), 2, "soft"),
    element(
      "details",
      {},
      element("summary", {}, "The map as TOML"),
      copied("the map as TOML", search.toml(trial), 10, "off"),
    ),
  );
}

/** The difference of two trials in words, B against A. */
function difference(search, one, two) {
  const [before, after] = [search.map(one), search.map(two)];
  const changed = before.filter((held, at) => held !== after[at]).length;
  const bytes = two.bytes - one.bytes;
  const rise = two.increase - one.increase;
  return (
    `B differs from A in ${changed} of ${before.length} components: ${bytes < 0 ? "" : "+"}${counted(bytes)} bytes, ` +
    `${signed(rise, 3 + search.metric.digits)} ${search.metric.unit}.`
  );
}

/** Rows of the table of components: what each is at in A and in B, with bytes and cost. */
function componentRows(search, one, two) {
  const [held, theirs] = [search.map(one), two ? search.map(two) : null];
  return search.components.map((component, at) => ({
    component,
    held: held[at],
    theirs: theirs === null ? null : theirs[at],
    bytes: component.bytes[held[at]],
    theirBytes: theirs === null ? null : component.bytes[theirs[at]],
    cost: search.cost(component.name, held[at]),
  }));
}

/** The columns of that table. */
function componentColumns(search, comparing) {
  const { metric } = search;
  const painted = (name) => {
    const chip = element("span", { class: "chip" }, name);
    chip.style.background = search.colourOf.get(name);
    chip.style.color = inkOn(search.colourOf.get(name));
    return chip;
  };
  const held = (row) => element("span", {}, painted(row.held), row.component.pinned ? " pinned" : null);
  const theirs = (row) => element("span", {}, row.theirs === row.held ? null : "≠ ", painted(row.theirs));
  const alone = {
    ...FALLING,
    title: "what lowering this component (or its group) alone costs, all others at their widest",
  };
  const besides = [
    { ...words("theirs", "in B", (row) => row.theirs), cell: theirs },
    counts("theirBytes", "bytes in B", (row) => row.theirBytes),
  ];
  return [
    words("name", "component", (row) => row.component.name),
    words("kind", "kind", (row) => row.component.kind),
    counts("parameters", "parameters", (row) => row.component.parameters),
    { ...words("held", comparing ? "in A" : "precision", (row) => row.held), cell: held },
    counts("bytes", comparing ? "bytes in A" : "bytes", (row) => row.bytes),
    ...(comparing ? besides : []),
    numbers(
      "cost",
      `cost alone, ${metric.unit}`,
      (row) => row.cost?.cost ?? null,
      (row) => interval(row.cost.cost, row.cost.spread, metric),
      alone,
    ),
  ];
}

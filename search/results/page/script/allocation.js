// The picture of a map: layers down, kinds of components across, each cell with its precisions, bytes and what they
// cost by the probes.

/** Rows of the picture: which components stand in which cell. */
function cellsOf(search) {
  const kinds = [...new Set(search.components.map((component) => component.kind))];
  const layers = [...new Set(search.components.map((component) => component.layer))];
  layers.sort((one, two) => (one ?? -1) - (two ?? -1));
  const cells = new Map();
  search.components.forEach((component, at) => {
    const key = `${component.layer ?? -1} ${kinds.indexOf(component.kind)}`;
    if (!cells.has(key)) cells.set(key, []);
    cells.get(key).push(at);
  });
  return { kinds, layers, cells };
}

/** The allocation of a trial's map; other: a trial whose differences are marked, or null. */
function allocation(search, trial, other) {
  const { kinds, layers, cells } = cellsOf(search);
  const [held, theirs] = [search.map(trial), other ? search.map(other) : null];
  const head = element("tr", {}, element("td"), ...kinds.map((kind) => element("th", { scope: "col" }, kind)));
  const rows = layers.map((layer) => {
    const name = layer === null ? "model" : `layer ${layer}`;
    const row = kinds.map((_, at) => cell(search, cells.get(`${layer ?? -1} ${at}`), held, theirs));
    return element("tr", {}, element("th", { scope: "row" }, name), ...row);
  });
  const caption = element(
    "caption",
    { class: "unseen" },
    `Allocation of trial ${trial.trial}: layers down, kinds of components across`,
  );
  const table = element(
    "table",
    { class: "allocation" },
    caption,
    element("thead", {}, head),
    element("tbody", {}, ...rows),
  );
  return element(
    "div",
    { class: "scrolled", tabindex: "0", role: "region", "aria-label": `Allocation of trial ${trial.trial}` },
    table,
  );
}

/** One cell: of several components each precision takes its share; a difference is a sign and a thick edge. */
function cell(search, group, held, theirs) {
  if (!group) return element("td", { class: "none" });
  const shares = new Map();
  for (const at of group) shares.set(held[at], (shares.get(held[at]) ?? 0) + 1);
  const sorted = search.precisions.map((one) => one.name).filter((name) => shares.has(name));
  const bytes = group.reduce((sum, at) => sum + search.components[at].bytes[held[at]], 0);
  const differs = theirs !== null && group.some((at) => held[at] !== theirs[at]);
  const parts = sorted.map((name) => {
    const colour = search.colourOf.get(name);
    const count = shares.get(name);
    const part = element("div", { class: "part" }, count === group.length ? name : `${name} ×${count}`);
    part.style.background = colour;
    part.style.color = inkOn(colour);
    part.style.flexGrow = count;
    return part;
  });
  const costs = group.map((at) => search.cost(search.components[at].name, held[at])?.cost ?? null);
  const cost = costs.every((one) => one === null) ? null : costs.reduce((sum, one) => sum + (one ?? 0), 0);
  const title = group
    .slice(0, 12)
    .map((at) => `${search.components[at].name}: ${held[at]}`)
    .join("\n");
  const more = group.length > 12 ? `\n… and ${group.length - 12} more` : "";
  return element(
    "td",
    { class: differs ? "differs" : null, title: title + more },
    element("div", { class: "parts" }, ...parts),
    element("div", { class: "size" }, differs ? element("b", {}, "≠ ") : null, sized(bytes)),
    cost === null
      ? null
      : element("div", { class: "size" }, `${signed(cost, 3 + search.metric.digits)} ${search.metric.unit}`),
  );
}

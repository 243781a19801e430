// A table that can be sorted by any column and filtered; of many rows it holds one page at a time.

const PAGE = 50;

class SortedTable {
  /**
   * place: the element it stands in. columns: {key, head, title?, text(row), value(row)?, cell(row)?, number?}; one
   * with a value can be sorted by it. sort: {key, descending}. words(row): what the filter looks in. kinds: choices
   * of a second filter, {word: keeps(row)}. marked(row): the class of a row, or null.
   */
  constructor(place, { caption, columns, sort, words, kinds = {}, marked = () => null }) {
    Object.assign(this, { place, columns, sort, words, kinds, marked, rows: [], page: 0 });
    this.filter = element("input", {
      type: "search",
      placeholder: "filter",
      "aria-label": `Filter: ${caption}`,
      input: () => this.turned(0),
    });
    this.kind = element(
      "select",
      { "aria-label": `Which rows: ${caption}`, change: () => this.turned(0) },
      ...Object.keys(kinds).map((word) => element("option", {}, word)),
    );
    this.counted = element("span", { class: "counted", role: "status" });
    this.before = element("button", { type: "button", click: () => this.turned(this.page - 1) }, "← previous");
    this.after = element("button", { type: "button", click: () => this.turned(this.page + 1) }, "next →");
    this.head = element("tr");
    this.body = element("tbody");
    place.replaceChildren(
      element(
        "div",
        { class: "controls" },
        this.filter,
        Object.keys(kinds).length ? this.kind : null,
        this.counted,
        this.before,
        this.after,
      ),
      element(
        "div",
        { class: "scrolled", tabindex: "0", role: "region", "aria-label": caption },
        element(
          "table",
          {},
          element("caption", { class: "unseen" }, caption),
          element("thead", {}, this.head),
          this.body,
        ),
      ),
    );
  }

  /** Show other rows; filter, order and page stay. */
  show(rows) {
    this.rows = rows;
    this.turned(this.page);
  }

  turned(page) {
    const word = this.filter.value.trim().toLowerCase();
    const keeps = this.kinds[this.kind.value] ?? (() => true);
    const kept = this.rows.filter((row) => keeps(row) && (!word || this.words(row).toLowerCase().includes(word)));
    this.order(kept);
    this.page = Math.max(0, Math.min(page, Math.ceil(kept.length / PAGE) - 1));
    const from = this.page * PAGE;
    const shown = kept.slice(from, from + PAGE);
    this.counted.textContent = kept.length
      ? `${counted(from + 1)}–${counted(from + shown.length)} of ${counted(kept.length)}`
      : "none";
    this.before.disabled = from === 0;
    this.after.disabled = from + PAGE >= kept.length;
    this.before.hidden = this.after.hidden = kept.length <= PAGE;
    this.head.replaceChildren(...this.columns.map((column) => this.heading(column)));
    this.body.replaceChildren(...shown.map((row) => this.line(row)));
  }

  /** Sort rows in place; what has no value comes last either way. */
  order(rows) {
    const value = this.columns.find((column) => column.key === this.sort.key).value;
    const way = this.sort.descending ? -1 : 1;
    rows.sort((one, two) => {
      const [a, b] = [value(one), value(two)];
      if (a === null || b === null) return (a === null) - (b === null);
      return way * (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    });
  }

  heading(column) {
    const sorted = column.key === this.sort.key;
    const way = sorted ? (this.sort.descending ? "descending" : "ascending") : "none";
    const arrow = element(
      "span",
      { "aria-hidden": "true", class: "arrow" },
      sorted ? (this.sort.descending ? " ▼" : " ▲") : " ↕",
    );
    const content = column.value
      ? element(
          "button",
          { type: "button", title: column.title, "data-key": column.key, click: () => this.sortBy(column) },
          column.head,
          arrow,
        )
      : column.head;
    return element(
      "th",
      { scope: "col", "aria-sort": column.value ? way : null, class: column.number ? "number" : null },
      content,
    );
  }

  sortBy(column) {
    const descending = column.key === this.sort.key ? !this.sort.descending : Boolean(column.descending);
    this.sort = { key: column.key, descending };
    this.turned(0);
    this.head.querySelector(`[data-key="${column.key}"]`).focus();
  }

  line(row) {
    const cells = this.columns.map((column, at) =>
      element(
        at === 0 ? "th" : "td",
        { scope: at === 0 ? "row" : null, class: column.number ? "number" : null },
        column.cell ? column.cell(row) : column.text(row),
      ),
    );
    return element("tr", { class: this.marked(row) }, ...cells);
  }
}

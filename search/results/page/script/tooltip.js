// What is under the pointer or in focus, beside it: one box, filled anew.

class Tooltip {
  constructor(box) {
    this.box = box;
  }

  /** Show a trial's lines and its map at a place of the window. */
  show(search, trial, x, y) {
    const [head, ...lines] = search.lines(trial);
    const kinds = element("ul", {}, ...search.summary(trial).map((line) => element("li", {}, line)));
    this.box.replaceChildren(element("strong", {}, head), ...lines.map((line) => element("div", {}, line)), kinds);
    this.box.dataset.trial = trial.trial;
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const right = x + 18 + width < document.documentElement.clientWidth;
    this.box.style.left = `${Math.max(4, right ? x + 18 : x - 18 - width)}px`;
    const above = y - 14 - height; // where a front has the fewest points
    this.box.style.top = `${above >= 4 ? above : Math.max(4, Math.min(y + 14, window.innerHeight - height - 4))}px`;
  }

  hide() {
    this.box.hidden = true;
  }
}

// The front: every trial's increase against its compression, as a chart that can be pointed at, focused and clicked.

const REACH = 18; // pixels from a point within which the pointer means it

class FrontChart {
  /** actions: select(trial), compare(trial); place: the element that holds the chart. */
  constructor(place, tooltip, actions) {
    this.place = place;
    this.tooltip = tooltip;
    this.actions = actions;
    this.view = null;
    place.addEventListener("pointermove", (event) => this.pointed(event));
    place.addEventListener("pointerleave", () => this.tooltip.hide());
    place.addEventListener("click", (event) => this.clicked(event));
    place.addEventListener("keydown", (event) => this.keyed(event));
  }

  /** Draw a search anew; picked: trials A and B, or null; logarithmic: which axes are. */
  async draw(search, picked, logarithmic) {
    const focused = this.place.contains(document.activeElement) ? document.activeElement.dataset.trial : null;
    this.search = search;
    this.shown = search.trials.filter((trial) => trial.increase !== null && trial.increase <= 3 * search.budget);
    this.view?.finalize();
    const spec = frontSpec(search, this.shown, logarithmic, this.place.clientWidth);
    this.view = new vega.View(vega.parse(spec), { renderer: "svg", container: this.place, hover: false });
    await this.pick(picked);
    this.makeFocusable();
    if (focused) this.points.find((point) => point.dataset.trial === focused)?.focus();
  }

  /** Put rings around the picked trials. */
  async pick(picked) {
    const rings = ["A", "B"]
      .map((word, at) => ({ word, trial: picked[at] }))
      .filter((ring) => this.shown.includes(ring.trial))
      .map((ring) => ({ word: ring.word, x: ring.trial.compression, y: ring.trial.increase }));
    await this.view.data("picked", rings).runAsync();
  }

  /** Points of the front can be reached by Tab once, and then by arrows. */
  makeFocusable() {
    const order = this.search.front
      .map((number) => this.search.trial(number))
      .filter((one) => this.shown.includes(one));
    this.points = [...this.place.querySelectorAll(".front-points path")];
    this.points[0]?.closest(".front-points").removeAttribute("aria-hidden"); // other marks say nothing of their own
    this.points.forEach((point, at) => {
      point.setAttribute("tabindex", at === 0 ? "0" : "-1");
      point.setAttribute("role", "button");
      point.setAttribute("data-trial", order[at].trial);
      point.setAttribute("aria-label", this.search.lines(order[at]).join("; "));
      point.addEventListener("focus", () => {
        const box = point.getBoundingClientRect();
        this.tooltip.show(this.search, order[at], box.right, box.top);
      });
      point.addEventListener("blur", () => this.tooltip.hide());
    });
  }

  /** The trial nearest to a place of the window, null where none is near; on the front they are nearer. */
  nearest(x, y) {
    const box = this.place.querySelector("svg").getBoundingClientRect();
    const [left, top] = this.view.origin();
    const [across, up] = [this.view.scale("x"), this.view.scale("y")];
    let [best, least] = [null, REACH];
    for (const trial of this.shown) {
      const far = Math.hypot(across(trial.compression) + left + box.left - x, up(trial.increase) + top + box.top - y);
      const away = this.search.onFront.has(trial.trial) ? far - 4 : far;
      if (away < least) [best, least] = [trial, away];
    }
    return best;
  }

  pointed(event) {
    const trial = this.nearest(event.clientX, event.clientY);
    this.place.style.cursor = trial ? "pointer" : "default";
    if (trial) this.tooltip.show(this.search, trial, event.clientX, event.clientY);
    else this.tooltip.hide();
  }

  clicked(event) {
    const trial = this.nearest(event.clientX, event.clientY);
    if (trial) (event.shiftKey ? this.actions.compare : this.actions.select)(trial);
  }

  keyed(event) {
    const at = this.points.indexOf(event.target);
    if (at < 0) return;
    const trial = this.search.trial(Number(event.target.dataset.trial));
    const step = { ArrowRight: -1, ArrowUp: -1, ArrowLeft: 1, ArrowDown: 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.actions.select(trial);
    else if (event.key === "c") this.actions.compare(trial);
    else if (step && this.points[at + step]) {
      this.points[at].setAttribute("tabindex", "-1");
      this.points[at + step].setAttribute("tabindex", "0");
      this.points[at + step].focus();
    } else return;
    event.preventDefault();
  }
}

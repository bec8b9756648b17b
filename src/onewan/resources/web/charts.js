// The plots of the Run screen, drawn by pages/plots.js: kept up to date, zoomed parts with numbers of
// their own, and the curves of other runs beside those of this one.

const MOST_OTHERS = 3; // a kind of dashes for each
const OTHERS_MS = 15000; // between two looks at other runs

export class Charts {
  // `places` are elements by the parts "training", "timesteps" and "speed"; `ask(name, path)` resolves
  // to an answer about a run, or null if it has not changed or is not there.
  constructor(places, name, ask) {
    this.places = places;
    this.name = name;
    this.ask = ask;
    this.plots = new Map(); // by their names
    this.own = null;
    this.others = new Map(); // plots by names of runs, in the order of their choice
  }

  async load() {
    const found = await this.ask(this.name, "plots");
    if (found) this.own = found;
    this.show();
  }

  // Choose or drop another run; resolves to whether that was possible.
  async compare(name, isChosen) {
    if (!isChosen) this.others.delete(name);
    else if (this.others.size >= MOST_OTHERS) return false;
    else this.others.set(name, null);
    await this.loadOthers();
    return true;
  }

  async loadOthers() {
    clearTimeout(this.timer);
    for (const name of [...this.others.keys()]) {
      const found = await this.ask(name, "plots");
      if (found && this.others.has(name)) this.others.set(name, Object.assign({}, ...Object.values(found)));
    }
    this.show();
    if (this.others.size) this.timer = setTimeout(() => this.loadOthers(), OTHERS_MS);
  }

  show() {
    if (!this.own) return;
    for (const [part, place] of Object.entries(this.places)) {
      const specs = this.own[part];
      for (const [name, spec] of Object.entries(specs)) this.draw(place, name, this.merged(name, spec, this.others));
      place.classList.toggle("filled", Object.keys(specs).length > 0);
      if (part === "timesteps") place.closest("section").hidden = !Object.keys(specs).length;
      for (const figure of [...place.children]) {
        if (!(figure.id in specs)) {
          this.plots.delete(figure.id);
          figure.remove();
        }
      }
    }
  }

  draw(place, name, spec) {
    let plot = this.plots.get(name);
    if (!plot) {
      const figure = onewanPlots.figureOf(name, spec);
      place.append(figure);
      plot = new onewanPlots.Plot(figure, spec);
      plot.onZoom = (view) => this.zoom(plot, view);
      this.plots.set(name, plot);
      plot.isOld = true; // drawn when it is seen
      return;
    }
    plot.update(spec);
    if (plot.view) this.zoom(plot, plot.view);
  }

  // The plot with the series of the other runs, by dashes.
  merged(name, spec, others) {
    const series = [...spec.series];
    let dash = 0;
    for (const [run, plots] of others) {
      dash += 1;
      for (const each of plots?.[name]?.series ?? []) {
        series.push({ ...each, label: `${run}: ${each.label}`, dash, lo: null, hi: null });
      }
    }
    return { ...spec, series };
  }

  async zoom(plot, view) {
    if (!plot.spec.x.whole) return; // of noise levels, not of steps
    const [first, last] = [Math.floor(Math.max(0, view[0])), Math.ceil(view[1])];
    const path = `plots?first=${first}&last=${last}`;
    const found = await Promise.all([this.name, ...this.others.keys()].map((run) => this.ask(run, path, true)));
    const [own, ...rest] = found.map((parts) => (parts ? Object.assign({}, ...Object.values(parts)) : null));
    if (!own?.[plot.name]) return;
    const others = [...this.others.keys()].map((run, i) => [run, rest[i]]);
    plot.detail(view, this.merged(plot.name, own[plot.name], others));
  }
}

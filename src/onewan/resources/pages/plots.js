"use strict";
// Draws plots: lines with bands, and histograms. Pointing at a plot, or arrow keys, show values; a drag
// zooms in; the legend hides and shows series. A page with numbers in an element #plots has its
// figures drawn at once; others take the class `onewanPlots.Plot`, and change its numbers with `update`.
(() => {
  const DASHES = ["", "7 4", "2 3", "10 3 2 3"];
  const ROOM = { top: 10, right: 14, bottom: 40 };

  function svg(name, attributes, parent) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent?.append(node);
    return node;
  }

  function html(name, properties, parent) {
    const node = Object.assign(document.createElement(name), properties);
    parent?.append(node);
    return node;
  }

  function shown(value, unit = "", digits = 4) {
    if (value === null || value === undefined) return "none";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e9)
      ? value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e")
      : value.toLocaleString("en-US", { maximumSignificantDigits: digits });
    return unit ? `${text} ${unit}` : text;
  }

  // Multiples of 1, 2 or 5 times a power of ten from `low` to `high`.
  function linearTicks(low, high, number, whole) {
    const rough = (high - low) / Math.max(1, number);
    const power = 10 ** Math.floor(Math.log10(rough));
    let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    if (whole) step = Math.max(1, Math.round(step));
    const ticks = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(Number((k * step).toPrecision(12)));
    return ticks;
  }

  function logTicks(low, high) {
    const ticks = [], parts = Math.log10(high / low) > 2.5 ? [1] : Math.log10(high / low) > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) {
      for (const part of parts) {
        const tick = Number((part * 10 ** e).toPrecision(3));
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
    return ticks;
  }

  // Those of `ticks` whose texts have room, powers of ten first, then those that begin with 5 or 2.
  function apart(ticks, place, room) {
    const rank = (tick) => {
      const digits = String(Number(tick.toExponential().split("e")[0]));
      return ["1", "5", "2"].includes(digits) ? ["1", "5", "2"].indexOf(digits) : 3;
    };
    const kept = [];
    for (const tick of ticks.slice().sort((a, b) => rank(a) - rank(b))) {
      if (kept.every((other) => Math.abs(place(tick) - place(other)) >= room)) kept.push(tick);
    }
    return kept.sort((a, b) => a - b);
  }

  function nearest(values, x) {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle;
      else high = middle;
    }
    return x - values[low] <= values[high] - x ? low : high;
  }

  // The mean of the `width` values around each one, without those that are null.
  function smoothed(values, width) {
    const sums = [0], counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return values.map((_, i) => {
      const low = Math.max(0, i - Math.floor(width / 2)), high = Math.min(values.length, i + Math.ceil(width / 2));
      const number = counts[high] - counts[low];
      return number ? (sums[high] - sums[low]) / number : null;
    });
  }

  // Over how many points `series` is smoothed, at `times` its usual smoothing.
  const points = (series, times) => (series.smoothing ? Math.round(series.smoothing[0] * times) : 0);

  function sample(series) {
    const icon = svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" });
    svg("path", { d: "M1 6H25", "stroke-dasharray": DASHES[series.dash] }, icon);
    if (series.points) marker(icon, series.mark, 13, 6);
    return icon;
  }

  function marker(parent, kind, x, y) {
    const r = 3.5;
    if (kind === 1) svg("rect", { class: "point", x: x - r, y: y - r, width: 2 * r, height: 2 * r }, parent);
    else if (kind === 2) svg("path", { class: "point", d: `M${x} ${y - 4.5}L${x + 4.5} ${y + 3.5}H${x - 4.5}Z` }, parent);
    else svg("circle", { class: "point", cx: x, cy: y, r }, parent);
  }

  // The element of a plot, for a page that has none of it.
  function figureOf(name, spec) {
    const figure = html("figure", { className: spec.wide ? "plot whole" : "plot", id: name });
    figure.dataset.summary = spec.summary;
    html("h3", { textContent: spec.title }, html("figcaption", {}, figure));
    html("p", { className: "about", textContent: spec.about }, figure);
    return figure;
  }

  class Plot {
    constructor(figure, spec) {
      this.name = figure.id;
      this.spec = spec;
      this.part = null; // the same for the part that is shown, in more detail, if `onZoom` got it
      this.onZoom = () => {};
      this.log = spec.log;
      this.times = 1; // of the usual smoothing
      this.view = null; // the part of the x axis that is shown; null for all of it
      this.hidden = new Set(); // labels of series
      const caption = figure.querySelector("figcaption");
      const tools = html("div", { className: "legend" }, caption);
      this.keys = html("span", { className: "keys" }, tools);
      this.smoother = html("select", {}, tools);
      this.smoother.setAttribute("aria-label", "smoothing");
      this.smoother.addEventListener("change", () => { this.times = Number(this.smoother.value); this.draw(); });
      if (spec.can_log) {
        const button = html("button", { type: "button", textContent: "log scale" }, tools);
        const press = () => button.setAttribute("aria-pressed", String(this.log));
        button.addEventListener("click", () => { this.log = !this.log; press(); this.draw(); });
        press();
        button.className = "log";
      }
      if (spec.cap) {
        // Pressed, the axis reaches to the highest value; else a few high ones are cut off.
        this.full = html("button", { type: "button", className: "log", textContent: "full height", hidden: true }, tools);
        this.full.addEventListener("click", () => {
          this.full.setAttribute("aria-pressed", String(this.full.getAttribute("aria-pressed") !== "true"));
          this.draw();
        });
        this.full.setAttribute("aria-pressed", "false");
      }
      this.reset = html("button", { type: "button", textContent: "whole plot", hidden: true }, tools);
      this.reset.addEventListener("click", () => this.zoom(null));
      this.canvas = html("div", { className: "canvas" }, null);
      caption.nextElementSibling.after(this.canvas);
      this.svg = svg("svg", { role: "img", tabindex: "0", "aria-label": figure.dataset.summary }, this.canvas);
      this.tip = html("div", { className: "tip", hidden: true }, this.canvas);
      this.tip.setAttribute("role", "status");
      this.listen();
      this.arrange();
      new ResizeObserver(() => {
        if (Math.abs(this.canvas.clientWidth - (this.width ?? 0)) > 1) this.draw();
      }).observe(this.canvas);
      // Redrawn when it comes into view, if its numbers have changed while nobody saw it.
      this.isSeen = true;
      new IntersectionObserver((entries) => {
        this.isSeen = entries[entries.length - 1].isIntersecting;
        if (this.isSeen && this.isOld) this.draw();
      }, { rootMargin: "200px" }).observe(figure);
    }

    // Take other numbers of the same plot; what the reader has chosen stays.
    update(spec) {
      this.spec = spec;
      this.svg.setAttribute("aria-label", spec.summary);
      const about = this.canvas.parentElement.querySelector(".about");
      if (about.textContent !== spec.about) about.textContent = spec.about;
      this.arrange();
      this.isOld = true;
      if (this.isSeen) this.draw();
    }

    // Show the zoomed part by numbers of its own.
    detail(view, spec) {
      if (!this.view || view[0] !== this.view[0] || view[1] !== this.view[1]) return;
      this.part = spec;
      this.arrange();
      this.draw();
    }

    // The buttons of the series, and the choice of the smoothing.
    arrange() {
      const labels = this.spec.series.map((series) => `${series.label} ${series.color} ${series.dash}`).join("\n");
      if (labels !== this.labels) {
        this.labels = labels;
        this.keys.replaceChildren();
        if (this.spec.series.length > 1) for (const series of this.spec.series) this.legend(series, this.keys);
      }
      const smooth = (this.part ?? this.spec).series.find((series) => series.smoothing);
      this.smoother.hidden = !smooth;
      if (!smooth) return;
      const [usual, steps] = smooth.smoothing, each = Math.round(steps / usual);
      const options = [[0, each > 1 ? `mean of ${each.toLocaleString("en-US")} steps` : "each step"]];
      for (const times of [0.25, 1, 4]) {
        const number = points(smooth, times);
        if (number > 1) options.push([times, `mean of ${Math.round(number * (steps / usual)).toLocaleString("en-US")} steps`]);
      }
      const texts = options.map(([times, text]) => `${times} ${text}`).join();
      if (texts === this.smoother.dataset.texts) return;
      this.smoother.dataset.texts = texts;
      this.smoother.replaceChildren(...options.map(([times, text]) => new Option(text, times)));
      if (!options.some(([times]) => times === this.times)) this.times = 1;
      this.smoother.value = String(this.times);
    }

    legend(series, tools) {
      const { label } = series;
      const button = html("button", { type: "button", className: `c-${series.color}` }, tools);
      button.append(sample(series), html("span", { textContent: label, className: "ink" }));
      const press = () => button.setAttribute("aria-pressed", String(!this.hidden.has(label)));
      button.addEventListener("click", () => {
        if (this.hidden.has(label)) this.hidden.delete(label);
        else this.hidden.add(label);
        press();
        this.draw();
      });
      press();
    }

    // Those that are shown, smoothed as the reader wishes.
    series() {
      const { series: all } = this.part ?? this.spec;
      if (this.smoothedOf !== all || this.smoothedBy !== this.times) {
        this.smoothedOf = all;
        this.smoothedBy = this.times;
        this.smooth = all.map((series) => {
          const width = points(series, this.times);
          return width > 1 ? { ...series, y: smoothed(series.y, width) } : series;
        });
      }
      return this.smooth.filter((series) => !this.hidden.has(series.label) && series.x.length);
    }

    ranges() {
      const all = this.spec.series.flatMap((s) => (s.x.length ? [s.x[0], s.x[s.x.length - 1]] : []));
      let [left, right] = this.view ?? this.spec.x.range ?? [Math.min(...all), Math.max(...all)];
      if (!(right > left)) [left, right] = [left - 0.5, left + 0.5];
      let low = Infinity, high = -Infinity;
      const take = (value) => {
        if (value === null || value === undefined || (this.log && value <= 0)) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      };
      for (const series of this.series()) {
        series.x.forEach((x, i) => {
          if (x < left || x > right) return;
          for (const values of [series.y, series.lo, series.hi]) if (values) take(values[i]);
        });
      }
      if (!this.view) for (const limit of this.spec.limits) take(limit.y);
      if (low > high) [low, high] = this.log ? [0.1, 1] : [0, 1];
      this.cut = false;
      if (this.full) {
        const top = this.usual(left, right);
        // Where a few values are so high that all others would look the same.
        const isSquashed = !this.log && high > low + 1.5 * (top - low);
        this.full.hidden = !isSquashed;
        this.cut = isSquashed && this.full.getAttribute("aria-pressed") !== "true";
        if (this.cut) high = top;
      }
      if (this.log) {
        if (high / low < 1.2) [low, high] = [low / 1.2, high * 1.2];
        else [low, high] = [low / 1.05, high * 1.05];
      } else {
        if (this.spec.zero) low = Math.min(0, low);
        // More where the text of a line has to fit above or below it.
        const room = (high - low || Math.abs(high) || 1) * (this.spec.limits.length ? 0.12 : 0.06);
        if (!(this.spec.zero && low === 0)) low -= room;
        high += this.cut ? 2 * room : room;
      }
      return { left, right, low, high };
    }

    // A value that most buckets, and all smoothed values, do not exceed.
    usual(left, right) {
      const tops = [];
      let smooth = -Infinity;
      for (const series of this.series()) {
        series.x.forEach((x, i) => {
          if (x < left || x > right || series.y[i] === null) return;
          smooth = Math.max(smooth, series.y[i]);
          tops.push((series.hi ?? series.y)[i] ?? series.y[i]);
        });
      }
      tops.sort((a, b) => a - b);
      const at = (share) => tops[Math.floor(share * (tops.length - 1))];
      return tops.length ? Math.max(smooth, Math.min(at(0.98), 3 * at(0.5))) : 0;
    }

    draw() {
      this.isOld = false;
      const width = (this.width = this.canvas.clientWidth), height = width < 480 ? 210 : 250;
      if (width < 50) return;
      const { left, right, low, high } = this.ranges();
      this.range = { left, right };
      const unit = this.spec.y.unit;
      const place = this.log
        ? (value) => Math.log(Math.max(value, low / 2) / low) / Math.log(high / low)
        : (value) => (value - low) / (high - low);
      const tall = height - ROOM.top - ROOM.bottom;
      const yTicks = this.log ? apart(logTicks(low, high), place, 24 / tall) : linearTicks(low, high, 5, false);
      const yTexts = yTicks.map((tick) => shown(tick));
      const room = { ...ROOM, left: 14 + 7 * Math.max(3, ...yTexts.map((t) => t.length)) };
      const inner = { width: width - room.left - room.right, height: tall };
      this.X = (x) => room.left + ((x - left) / (right - left)) * inner.width;
      this.Y = (y) => room.top + (1 - place(y)) * inner.height;
      this.back = (pixel) => left + ((pixel - room.left) / inner.width) * (right - left);
      this.room = room;
      this.inner = inner;
      this.svg.replaceChildren();
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.style.height = `${height}px`;
      const bottom = room.top + inner.height;
      const axis = svg("g", { class: "axis" }, this.svg);
      yTicks.forEach((tick, i) => {
        svg("line", { x1: room.left, x2: width - room.right, y1: this.Y(tick), y2: this.Y(tick) }, axis);
        svg("text", { x: room.left - 6, y: this.Y(tick) + 4, "text-anchor": "end" }, axis).textContent = yTexts[i];
      });
      for (const tick of linearTicks(left, right, inner.width / 75, this.spec.x.whole)) {
        const x = this.X(tick);
        svg("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4 }, axis);
        svg("text", { x, y: bottom + 17, "text-anchor": "middle" }, axis).textContent = shown(tick, "", 7);
      }
      svg("line", { x1: room.left, x2: width - room.right, y1: bottom, y2: bottom }, axis);
      svg("text", { class: "name", x: room.left + inner.width / 2, y: height - 5, "text-anchor": "middle" }, axis).textContent = this.spec.x.label;
      const clip = `clip-${this.name}`;
      const frame = svg("clipPath", { id: clip }, svg("defs", {}, this.svg));
      svg("rect", { x: room.left, y: room.top - 2, width: inner.width + 1, height: inner.height + 3 }, frame);
      const inside = svg("g", { "clip-path": `url(#${clip})` }, this.svg);
      for (const series of this.series()) this.drawSeries(series, svg("g", { class: `series c-${series.color}` }, inside), bottom);
      this.spec.limits.forEach((limit, index) => this.drawLimit(limit, index, unit, low, high));
      this.cursor = svg("line", { class: "cursor", y1: room.top, y2: bottom, visibility: "hidden" }, this.svg);
      this.drawn = svg("rect", { class: "drawn", y: room.top, height: inner.height, width: 0 }, this.svg);
      this.reset.hidden = !this.view;
    }

    drawSeries(series, group, bottom) {
      const at = (values, i) => `${this.X(series.x[i]).toFixed(1)} ${this.Y(values[i]).toFixed(1)}`;
      // Runs of values without a gap.
      const parts = (values) => {
        const found = [];
        let part = [];
        values.forEach((value, i) => {
          if (value === null || (this.log && value <= 0)) {
            if (part.length) found.push(part);
            part = [];
          } else part.push(i);
        });
        return part.length ? [...found, part] : found;
      };
      if (series.bars) {
        const half = (series.x[1] - series.x[0]) / 2;
        let d = "";
        series.x.forEach((x, i) => {
          if (!series.y[i]) return;
          const [a, b] = [this.X(x - half).toFixed(1), this.X(x + half).toFixed(1)];
          d += `M${a} ${bottom}V${this.Y(series.y[i]).toFixed(1)}H${b}V${bottom}Z`;
        });
        svg("path", { class: "bars", d }, group);
        return;
      }
      if (series.lo) {
        for (const part of parts(series.lo)) {
          const there = part.map((i) => at(series.hi, i)).join("L");
          const back = part.slice().reverse().map((i) => at(series.lo, i)).join("L");
          svg("path", { class: "band", d: `M${there}L${back}Z` }, group);
        }
      }
      if (this.cut && series.hi) {
        const top = this.room.top + 1;
        let d = "";
        series.hi.forEach((value, i) => {
          if (value === null || this.Y(value) >= this.room.top - 2) return;
          const x = this.X(series.x[i]);
          d += `M${x.toFixed(1)} ${top}l4 7h-8Z`;
        });
        svg("path", { class: "above", d }, group);
      }
      for (const part of parts(series.y)) {
        svg("path", { class: "line", d: `M${part.map((i) => at(series.y, i)).join("L")}`, "stroke-dasharray": DASHES[series.dash] }, group);
        if (series.points && part.length <= 80) {
          for (const i of part) marker(group, series.mark, this.X(series.x[i]), this.Y(series.y[i]));
        } else if (part.length === 1) marker(group, series.mark, this.X(series.x[part[0]]), this.Y(series.y[part[0]]));
      }
    }

    drawLimit(limit, index, unit, low, high) {
      if (limit.y < low || limit.y > high) return;
      const group = svg("g", { class: "limit" }, this.svg), y = this.Y(limit.y);
      svg("line", { x1: this.room.left, x2: this.room.left + this.inner.width, y1: y, y2: y }, group);
      // To the left and to the right, since two of them may lie close together.
      const { left } = this.room, right = left + this.inner.width;
      const side = index % 2 ? { x: right - 6, "text-anchor": "end" } : { x: left + 6 };
      const isBelow = y < this.room.top + 18;
      // On a narrow screen there is no room for two of them at one height.
      const lower = this.width < 560 && index % 2 ? (isBelow ? 14 : 19) : 0;
      const text = svg("text", { ...side, y: y + (isBelow ? 14 : -5) + lower }, group);
      text.textContent = `${limit.label}: ${shown(limit.y, unit)}`;
    }

    zoom(view) {
      this.view = view;
      this.part = null;
      this.tip.hidden = true;
      this.arrange();
      this.draw();
      if (view) this.onZoom(view);
    }

    point(x) {
      const rows = [];
      let at = null;
      for (const series of this.series()) {
        const i = nearest(series.x, x);
        if (series.x[i] < this.range.left || series.x[i] > this.range.right) continue;
        if (at === null || Math.abs(series.x[i] - x) < Math.abs(at - x)) at = series.x[i];
        rows.push({ series, i });
      }
      if (at === null) return;
      this.at = at;
      const { x: axis, y } = this.spec;
      const whole = axis.whole ? Math.round(at) : at;
      this.tip.replaceChildren(html("b", { textContent: `${axis.label} ${shown(whole, "", 7)}` }));
      for (const { series, i } of rows) {
        const row = html("div", {}, this.tip);
        html("span", { textContent: series.label, className: `c-${series.color}` }, row);
        let text = shown(series.y[i], y.unit);
        if (series.lo && series.lo[i] !== null && series.lo[i] !== series.hi[i]) text += ` (${shown(series.lo[i])} to ${shown(series.hi[i])})`;
        html("span", { textContent: text }, row);
      }
      this.tip.hidden = false;
      const pixel = this.X(at);
      const leftOf = pixel > this.width / 2;
      this.tip.style.left = leftOf ? "" : `${pixel + 10}px`;
      this.tip.style.right = leftOf ? `${this.width - pixel + 10}px` : "";
      for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, pixel);
      this.cursor.setAttribute("visibility", "visible");
    }

    leave() {
      this.tip.hidden = true;
      this.cursor?.setAttribute("visibility", "hidden");
      this.drawn?.setAttribute("width", 0);
      this.from = null;
    }

    listen() {
      const pixel = (event) => event.clientX - this.svg.getBoundingClientRect().left;
      this.svg.addEventListener("pointermove", (event) => {
        const x = pixel(event);
        if (this.from != null) {
          this.drawn.setAttribute("x", Math.min(x, this.from));
          this.drawn.setAttribute("width", Math.abs(x - this.from));
        }
        this.point(this.back(x));
      });
      this.svg.addEventListener("pointerdown", (event) => {
        if (event.button !== 0 || event.pointerType === "touch") return;
        this.from = pixel(event);
        this.svg.setPointerCapture(event.pointerId);
      });
      this.svg.addEventListener("pointerup", (event) => {
        const from = this.from, to = pixel(event);
        this.leave();
        if (from == null || Math.abs(to - from) < 8) return;
        const ends = [this.back(Math.min(from, to)), this.back(Math.max(from, to))];
        this.zoom([Math.max(ends[0], this.range.left), Math.min(ends[1], this.range.right)]);
      });
      this.svg.addEventListener("pointerleave", () => { if (this.from == null) this.leave(); });
      this.svg.addEventListener("dblclick", () => this.zoom(null));
      this.svg.addEventListener("blur", () => this.leave());
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }

    key(event) {
      const { left, right } = this.range, width = right - left, at = this.at ?? left;
      const moves = { ArrowLeft: at - width / 60, ArrowRight: at + width / 60, Home: left, End: right };
      if (event.key in moves) {
        this.point(Math.min(right, Math.max(left, moves[event.key])));
      } else if (event.key === "+") {
        this.zoom([Math.max(left, at - width / 4), Math.min(right, at + width / 4)]);
      } else if (event.key === "-" || event.key === "Escape") {
        this.zoom(null);
      } else return;
      event.preventDefault();
    }
  }

  globalThis.onewanPlots = { Plot, figureOf };
  const source = document.getElementById("plots");
  if (!source) return;
  const plots = JSON.parse(source.textContent);
  for (const figure of document.querySelectorAll("figure.plot")) new Plot(figure, plots[figure.id]).draw();
})();

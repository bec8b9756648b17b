// The sample videos of the Run screen: a grid of steps and prompts of which only what is seen is in the
// page, played together; and two videos compared.

const CAPTION = 46; // pixels below a picture
const GAP = 10;
const STILL_MS = 120; // pictures are loaded when scrolling has stopped for so long

function make(tag, properties = {}, parent = null) {
  const node = Object.assign(document.createElement(tag), properties);
  parent?.append(node);
  return node;
}

function choice(parent, label, options, onChange) {
  const name = make("label", { className: "field" }, parent);
  make("span", { textContent: label }, name);
  const select = make("select", {}, name);
  for (const [value, text] of options) select.append(new Option(text, value));
  select.addEventListener("change", onChange);
  return select;
}

const stepText = (step) => (step ? `step ${step.toLocaleString("en-US")}` : "base model (step 0)");

function promptText({ text, seed, distilled }) {
  const more = [seed === null ? "" : `seed ${seed}`, distilled ? "with distilled LoRAs" : ""].filter(Boolean).join(", ");
  return { text, more };
}

function videoOf(address, label, [width, height]) {
  const video = make("video", { muted: true, playsInline: true, preload: "none", width, height });
  video.setAttribute("aria-label", label);
  video.dataset.address = address;
  return video;
}

// Only now is anything loaded.
function load(video) {
  if (!video.dataset.address || video.src) return;
  video.poster = video.dataset.address.replace(/^\/media\//, "/poster/");
  video.src = video.dataset.address;
}

function drop(video) {
  if (!video.src) return;
  video.pause();
  video.removeAttribute("src");
  video.load();
}

export class Samples {
  constructor(place, name, ask, runs) {
    this.name = name;
    this.ask = ask;
    this.cells = new Map(); // of the grid that are in the page, by "row column"
    this.bar = make("div", { className: "sample-tools" }, place);
    this.only = choice(this.bar, "Prompt", [["", "all prompts"]], () => this.arrange());
    this.controls = make("div", { className: "controls" });
    this.controls.dataset.name = "the grid";
    const together = make("div", { className: "together" }, place);
    together.append(this.controls);
    this.empty = make("p", { className: "soft", textContent: "Loading." }, place);
    this.versus = new Versus(make("div", { className: "versus", hidden: true }, place), name, ask, runs);
    this.heads = make("div", { className: "heads" });
    this.view = make("div", { className: "grid", tabIndex: 0 }, place);
    this.view.setAttribute("role", "group");
    this.view.setAttribute("aria-label", "sample videos by step and prompt");
    this.space = make("div", { className: "space" }, this.view);
    this.space.append(this.heads);
    this.view.addEventListener("scroll", () => this.scrolled(), { passive: true });
    new ResizeObserver(() => this.arrange()).observe(this.view);
    // Nothing is loaded before the grid is seen.
    new IntersectionObserver((entries) => {
      this.isSeen = entries[entries.length - 1].isIntersecting;
      this.render();
    }, { rootMargin: "300px" }).observe(this.view);
  }

  async load() {
    const found = await this.ask(this.name, "samples");
    if (!found) return;
    this.data = found;
    const { prompts } = found;
    const chosen = this.only.value;
    this.only.replaceChildren(new Option("all prompts", ""));
    prompts.forEach((prompt, i) => {
      const { text, more } = promptText(prompt);
      this.only.append(new Option(`${text.length > 60 ? `${text.slice(0, 60)}…` : text}${more ? ` (${more})` : ""}`, i));
    });
    this.only.value = prompts[chosen] ? chosen : "";
    this.table = new Map(); // addresses by step and prompt
    for (const [step, prompt, address] of found.videos) this.table.set(`${step} ${prompt}`, address);
    // The newest ones first: they are what one comes to see.
    this.steps = [...new Set(found.videos.map(([step]) => step))].sort((a, b) => b - a);
    const isEmpty = !found.videos.length;
    this.empty.hidden = !isEmpty;
    this.empty.textContent = found.expected ? "No sample is there yet." : "The run makes no samples.";
    for (const element of [this.bar, this.controls, this.view]) element.hidden = isEmpty;
    if (isEmpty) return;
    if (!this.group) {
      this.controls.dataset.fps = found.fps;
      this.group = new onewanPlayers.Group(this.controls, () => this.visible());
    }
    this.versus.take(found, this.name);
    this.arrange();
  }

  // Where the cells are.
  arrange() {
    if (!this.data?.videos.length) return;
    const width = this.view.clientWidth, { prompts, shape } = this.data;
    if (!width) return;
    const only = this.only.value === "" ? null : Number(this.only.value);
    const shown = only === null ? prompts.map((_, i) => i) : [only];
    if (only === null) {
      this.columns = shown.length;
      this.cell = Math.max(Math.min(200, width - 40), Math.min(520, Math.floor((width - GAP) / shown.length) - GAP));
      this.at = (row, column) => [this.steps[row], shown[column]];
      this.rows = this.steps.length;
    } else {
      const steps = this.steps.filter((step) => this.table.has(`${step} ${only}`));
      this.columns = Math.max(1, Math.floor(width / (width < 500 ? 180 : 250)));
      this.cell = Math.floor((width - GAP) / this.columns) - GAP;
      this.at = (row, column) => [steps[row * this.columns + column], only];
      this.rows = Math.ceil(steps.length / this.columns);
    }
    this.picture = Math.round((this.cell * shape[1]) / shape[0]);
    this.row = this.picture + CAPTION + GAP;
    this.top = 50; // of the prompts above the grid, which stay there
    this.heads.replaceChildren();
    shown.forEach((prompt, column) => {
      const { text, more } = promptText(prompts[prompt]);
      const head = make("div", { className: "head-cell", title: text }, this.heads);
      make("h3", { textContent: text }, head);
      make("span", { textContent: more }, head);
      Object.assign(head.style, { left: `${GAP + column * (this.cell + GAP)}px`, width: `${only === null ? this.cell : width - 2 * GAP}px` });
    });
    Object.assign(this.space.style, {
      height: `${this.top + this.rows * this.row}px`,
      width: `${GAP + this.columns * (this.cell + GAP)}px`,
    });
    // As high as its rows, up to most of the window.
    this.view.style.height = `${Math.min(this.top + this.rows * this.row + 16, Math.max(420, Math.round(innerHeight * 0.8)))}px`;
    for (const key of [...this.cells.keys()]) this.remove(key);
    this.render();
  }

  scrolled() {
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.render(); });
  }

  // Put the cells that are seen, and those next to them, into the page, and take out all others.
  render() {
    if (!this.isSeen || !this.row || !this.group) return;
    const { scrollTop, scrollLeft, clientHeight, clientWidth } = this.view, across = this.cell + GAP;
    const rows = [Math.floor((scrollTop - this.top) / this.row) - 1, Math.ceil((scrollTop + clientHeight - this.top) / this.row) + 1];
    const columns = [Math.floor(scrollLeft / across) - 1, Math.ceil((scrollLeft + clientWidth) / across) + 1];
    const wanted = new Set();
    for (let row = Math.max(0, rows[0]); row < Math.min(this.rows, rows[1]); row++) {
      for (let column = Math.max(0, columns[0]); column < Math.min(this.columns, columns[1]); column++) {
        const [step, prompt] = this.at(row, column), address = this.table.get(`${step} ${prompt}`);
        if (!address) continue;
        const key = `${row} ${column}`;
        wanted.add(key);
        if (this.cells.get(key)?.dataset.address === address) continue;
        this.remove(key);
        this.add(key, row, column, step, prompt, address);
      }
    }
    for (const key of [...this.cells.keys()]) if (!wanted.has(key)) this.remove(key);
    clearTimeout(this.still);
    this.still = setTimeout(() => {
      for (const cell of this.cells.values()) load(cell.querySelector("video"));
      this.group.adopt();
    }, STILL_MS);
  }

  add(key, row, column, step, prompt, address) {
    const cell = make("figure", { className: "cell" });
    cell.dataset.address = address;
    const label = `${this.data.prompts[prompt].text}, ${stepText(step)}`;
    const video = videoOf(address, label, this.data.shape);
    video.style.height = `${this.picture}px`;
    video.addEventListener("error", () => { if (video.src) cell.classList.add("broken"); });
    cell.append(video);
    make("p", { className: "gone", textContent: "This video can't be played, or is no longer there." }, cell);
    const caption = make("figcaption", {}, cell);
    make("span", { textContent: stepText(step) }, caption);
    const button = make("button", { type: "button", textContent: "Compare" }, caption);
    button.setAttribute("aria-label", `compare ${label}`);
    button.addEventListener("click", () => this.versus.open(prompt, step));
    Object.assign(cell.style, {
      left: `${GAP + column * (this.cell + GAP)}px`,
      top: `${this.top + row * this.row}px`,
      width: `${this.cell}px`,
      height: `${this.row - GAP}px`,
    });
    this.cells.set(key, cell);
    this.space.append(cell);
  }

  remove(key) {
    const cell = this.cells.get(key);
    if (!cell) return;
    drop(cell.querySelector("video"));
    cell.remove();
    this.cells.delete(key);
  }

  // The videos of the grid that can be seen now.
  visible() {
    const box = this.view.getBoundingClientRect();
    const low = Math.max(box.top, 0), high = Math.min(box.bottom, innerHeight);
    return [...this.cells.values()].map((cell) => cell.querySelector("video")).filter((video) => {
      const { top, bottom, left, right } = video.getBoundingClientRect();
      return bottom > low && top < high && right > box.left && left < box.right && !video.parentElement.classList.contains("broken");
    });
  }
}

// Two videos of one prompt and seed: of two steps, or of two runs.
class Versus {
  constructor(place, name, ask, runs) {
    this.place = place;
    this.ask = ask;
    this.known = new Map(); // data of runs by their names
    const head = make("div", { className: "versus-head" }, place);
    make("h3", { textContent: "Compare two videos" }, head);
    this.prompt = make("p", { className: "soft" }, head);
    const tools = make("div", { className: "sample-tools" }, place);
    const runOptions = [name, ...runs].map((run) => [run, run]);
    this.left = { step: choice(tools, "A: step", [], () => this.show()), run: { value: name } };
    this.right = {
      run: choice(tools, "B: run", runOptions, () => this.fill()),
      step: choice(tools, "B: step", [], () => this.show()),
    };
    this.how = choice(tools, "Shown", [["beside", "side by side"], ["split", "one over the other"]], () => this.show());
    const split = make("label", { className: "field", hidden: true }, tools);
    make("span", { textContent: "A | B" }, split);
    this.split = make("input", { type: "range", min: 0, max: 100, value: 50 }, split);
    this.split.setAttribute("aria-label", "where A ends and B begins");
    this.split.addEventListener("input", () => this.cut());
    const close = make("button", { type: "button", textContent: "Close" }, tools);
    close.addEventListener("click", () => { this.place.hidden = true; this.group?.pause(); this.stage.replaceChildren(); });
    this.controls = make("div", { className: "controls" });
    this.controls.dataset.name = "A and B";
    const together = make("div", { className: "together" }, place);
    together.append(this.controls);
    this.stage = make("div", { className: "stage" }, place);
  }

  take(data, name) {
    this.known.set(name, data);
    this.name = name;
    if (!this.group) {
      this.controls.dataset.fps = data.fps;
      this.group = new onewanPlayers.Group(this.controls, () => [...this.stage.querySelectorAll("video")]);
    }
  }

  // Open with the video of a step as A, and as B that of the step before, or the base model's.
  async open(prompt, step) {
    this.chosen = this.known.get(this.name).prompts[prompt];
    const { text, more } = promptText(this.chosen);
    this.prompt.textContent = more ? `${text} (${more})` : text;
    const steps = this.stepsOf(this.name);
    this.options(this.left.step, steps, step);
    this.right.run.value = this.name;
    this.options(this.right.step, steps, steps.filter((each) => each < step).pop() ?? steps[0]);
    this.place.hidden = false;
    this.show();
    this.place.scrollIntoView({ block: "nearest" });
    this.left.step.focus({ preventScroll: true });
  }

  // The steps of a run that have a video of the prompt and the seed, ascending.
  stepsOf(run) {
    return [...this.addresses(run).keys()].sort((a, b) => a - b);
  }

  addresses(run) {
    const data = this.known.get(run), same = (a, b) => a.text === b.text && a.seed === b.seed && a.distilled === b.distilled;
    const found = new Map();
    for (const [step, prompt, address] of data?.videos ?? []) {
      if (same(data.prompts[prompt], this.chosen)) found.set(step, address);
    }
    return found;
  }

  options(select, steps, chosen) {
    select.replaceChildren(...steps.map((step) => new Option(stepText(step), step)));
    select.value = String(chosen);
  }

  async fill() {
    const run = this.right.run.value;
    if (!this.known.has(run)) {
      const found = await this.ask(run, "samples");
      if (found) this.known.set(run, found);
    }
    const steps = this.stepsOf(run), wished = Number(this.left.step.value);
    this.options(this.right.step, steps, steps.filter((step) => step <= wished).pop() ?? steps[0]);
    this.show();
  }

  show() {
    this.group.pause();
    const isSplit = this.how.value === "split";
    this.split.parentElement.hidden = !isSplit;
    this.stage.className = `stage ${isSplit ? "split" : "beside"}`;
    this.stage.replaceChildren();
    for (const [letter, side] of [["A", this.left], ["B", this.right]]) {
      const run = side.run.value, step = Number(side.step.value), address = this.addresses(run).get(step);
      const figure = make("figure", { className: `cell side-${letter}` }, this.stage);
      const what = run === this.name ? stepText(step) : `${run}, ${stepText(step)}`;
      if (!address || side.step.value === "") {
        make("p", { className: "gone", textContent: `${run} has no video of this prompt with this seed.` }, figure);
      } else {
        const video = videoOf(address, `${letter}: ${what}`, this.known.get(run).shape);
        figure.append(video);
        load(video);
      }
      make("figcaption", { textContent: `${letter}: ${what}` }, figure);
    }
    this.cut();
    this.group.adopt();
  }

  cut() {
    this.stage.style.setProperty("--cut", `${this.split.value}%`);
  }
}

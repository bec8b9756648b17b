// The Run screen: asks for the run's summary every two seconds, and for what that says has changed.
import { Charts } from "./charts.js";
import { Samples } from "./samples.js";

const EVERY_MS = 2000;
const MOST_LINES = 5000;

function make(tag, properties = {}, parent = null) {
  const node = Object.assign(document.createElement(tag), properties);
  parent?.append(node);
  return node;
}

class Unanswered extends Error {
  constructor(status) {
    super(`status ${status}`);
    this.status = status; // 0: the server was not reached
  }
}

const tags = new Map(); // of the answers that are known, by their addresses

// An answer about a run; null if it is the same as the last one, unless `again`, or if there is none.
async function ask(run, path, again = false) {
  const address = `/api/run/${encodeURIComponent(run)}/${path}`;
  let response;
  try {
    response = await fetch(address, { cache: "no-cache" });
  } catch {
    throw new Unanswered(0);
  }
  if (!response.ok) throw new Unanswered(response.status);
  const tag = response.headers.get("etag");
  if (!again && tags.get(address) === tag) return null;
  tags.set(address, tag);
  return response.json();
}

// The same; null also if there is no answer now.
async function askOrNull(...given) {
  try {
    return await ask(...given);
  } catch (error) {
    if (error instanceof Unanswered) return null;
    throw error;
  }
}

class Lines {
  // Lines of text that grow: those of events, or of the log.
  constructor(place, name, path, kinds) {
    this.name = name;
    this.path = path;
    this.next = 0;
    this.lines = [];
    const tools = make("div", { className: "sample-tools" }, place);
    const search = make("label", { className: "field" }, tools);
    make("span", { textContent: "Search" }, search);
    this.search = make("input", { type: "search" }, search);
    this.search.addEventListener("input", () => this.show());
    if (kinds) {
      const field = make("label", { className: "field" }, tools);
      make("span", { textContent: "Shown" }, field);
      this.kind = make("select", {}, field);
      this.kind.append(new Option("all events", ""), ...Object.keys(kinds).map((each) => new Option(each, each)));
      this.kinds = kinds;
      this.kind.addEventListener("change", () => this.show());
    }
    const follow = make("label", { className: "field" }, tools);
    this.follow = make("input", { type: "checkbox", checked: true }, follow);
    make("span", { textContent: "follow" }, follow);
    this.follow.addEventListener("change", () => this.end());
    this.count = make("span", { className: "soft" }, tools);
    this.count.setAttribute("role", "status");
    this.text = make("pre", { className: "lines", tabIndex: 0 }, place);
    this.text.setAttribute("aria-label", path);
    this.text.setAttribute("role", "region");
    // Who scrolls up wants to read.
    this.text.addEventListener("wheel", () => { if (!this.isAtEnd()) this.follow.checked = false; }, { passive: true });
  }

  async load() {
    const found = await askOrNull(this.name, `${this.path}?after=${this.next}`, true);
    if (!found) return;
    if (found.new) this.lines = [];
    this.next = found.next;
    this.lines.push(...found.lines);
    if (this.lines.length > MOST_LINES) this.lines = this.lines.slice(-MOST_LINES);
    this.show();
  }

  show() {
    const wanted = this.search.value.toLowerCase(), kinds = this.kind?.value ? this.kinds[this.kind.value] : null;
    const texts = [];
    for (const line of this.lines) {
      if (kinds && !kinds.includes(line.kind)) continue;
      // Swedish times are those of ISO 8601, as on the other screens; here in the reader's time zone.
      const text = typeof line === "string" ? line : `${new Date(line.time).toLocaleString("sv-SE")}  ${line.text}`;
      if (text.toLowerCase().includes(wanted)) texts.push(text);
    }
    this.text.textContent = texts.join("\n") || (this.lines.length ? "No line has this." : "Nothing yet.");
    this.count.textContent = `${texts.length.toLocaleString("en-US")} ${texts.length === 1 ? "line" : "lines"}`;
    this.end();
  }

  isAtEnd() {
    return this.text.scrollTop + this.text.clientHeight >= this.text.scrollHeight - 40;
  }

  end() {
    if (this.follow.checked) this.text.scrollTop = this.text.scrollHeight;
  }
}

class Run {
  constructor(view) {
    this.view = view;
    this.name = view.dataset.run;
    const other = JSON.parse(view.dataset.others);
    const place = (id) => document.getElementById(id);
    this.place = place;
    this.charts = new Charts(
      { training: place("run-training"), timesteps: place("run-timesteps"), speed: place("run-speed") }, this.name, askOrNull,
    );
    this.samples = new Samples(place("run-samples"), this.name, askOrNull, other);
    this.events = new Lines(place("run-events"), this.name, "events", {
      "warnings and notes": ["warning", "note"],
      "saved and exported": ["saved", "exported", "best", "best_weights"],
      "settings and requests": ["settings", "rejected"],
    });
    this.log = new Lines(place("run-log"), this.name, "log");
    this.versions = {};
    this.compare(place("run-compare"), other);
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.poll(); });
  }

  compare(place, other) {
    if (!other.length) return;
    const box = make("details", {}, place);
    make("summary", { textContent: "Compare with other runs" }, box);
    const list = make("div", { className: "choices" }, box);
    const told = make("p", { className: "soft", textContent: "Their curves are dashed; three at most." }, box);
    for (const name of other) {
      const label = make("label", {}, list);
      const check = make("input", { type: "checkbox" }, label);
      make("span", { textContent: name }, label);
      check.addEventListener("change", async () => {
        if (await this.charts.compare(name, check.checked)) return;
        check.checked = false;
        told.classList.add("wrong");
      });
    }
  }

  async poll() {
    clearTimeout(this.timer);
    try {
      const summary = await ask(this.name, "summary");
      this.told("");
      if (summary) {
        this.show(summary);
        await this.load(summary.versions);
      }
    } catch (error) {
      if (!(error instanceof Unanswered)) throw error;
      if (error.status === 404) {
        this.told("The folder of this run is no longer there.");
        this.view.classList.add("ready");
        return;
      }
      this.told("The page's server does not answer; this is how the run stood before.");
    }
    if (!document.hidden) this.timer = setTimeout(() => this.poll(), EVERY_MS);
  }

  async load(versions) {
    const changed = (name) => versions[name] !== this.versions[name];
    const parts = { plots: this.charts, samples: this.samples, events: this.events, log: this.log };
    const asked = Object.keys(parts).filter(changed);
    this.versions = versions;
    await Promise.all(asked.map((name) => parts[name].load()));
  }

  told(text) {
    const place = this.place("run-told");
    if (place.textContent !== text) place.textContent = text;
    place.hidden = !text;
  }

  show(summary) {
    const badge = this.place("run-state");
    badge.textContent = summary.state;
    badge.className = `badge ${summary.style}`;
    this.place("run-facts").textContent = [summary.facts, summary.activity].filter(Boolean).join(" · ");
    this.place("run-progress").value = summary.progress;
    const tiles = this.place("run-tiles");
    tiles.replaceChildren(...summary.tiles.map(([name, value, more]) => {
      const tile = document.createElement("li");
      for (const [kind, text] of [["name", name], ["value", value], ["more", more]]) make("span", { className: kind, textContent: text }, tile);
      return tile;
    }));
    this.place("run-machine").replaceChildren(...summary.machine.map(([name, value, share]) => {
      const gauge = make("div", { className: "gauge" });
      for (const text of [name, value]) make("span", { textContent: text }, gauge);
      // The bar repeats the number beside it.
      if (share !== null) make("div", { className: "bar", ariaHidden: "true" }, gauge).style.setProperty("--share", `${100 * share}%`);
      return gauge;
    }));
    this.problem(summary);
    this.view.classList.add("ready");
  }

  problem({ problem, gaps, warnings }) {
    const key = JSON.stringify([problem, gaps, warnings]);
    if (key === this.problems) return;
    this.problems = key;
    const place = this.place("run-problem");
    place.replaceChildren();
    const box = (heading, lines, kind) => {
      const section = make("div", { className: `box ${kind}` }, place);
      make("h2", { textContent: heading }, section);
      const list = make("ul", {}, section);
      for (const line of lines) make("li", { textContent: line }, list);
    };
    if (problem) box(problem.heading, problem.lines, "bad");
    if (gaps.length) box("What could not be read", gaps, "");
    if (warnings.length) {
      const folded = make("details", { className: "box" }, place);
      make("summary", { textContent: warnings.length === 1 ? "1 warning" : `${warnings.length} warnings` }, folded);
      const list = make("ul", {}, folded);
      for (const line of warnings) make("li", { textContent: line }, list);
    }
  }
}

// The elements come with NiceGUI's own script.
function begin() {
  const view = document.getElementById("run");
  if (!view) return false;
  const run = new Run(view);
  globalThis.onewanRun = run;
  run.poll();
  return true;
}

if (!begin()) {
  const observer = new MutationObserver(() => { if (begin()) observer.disconnect(); });
  observer.observe(document.documentElement, { childList: true, subtree: true });
}

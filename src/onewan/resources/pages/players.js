"use strict";
// Videos: a play button for each, or one for all of a group, which are then shown at the same time of
// each. The page can be used without it: videos then have the controls of the browser, which cover a
// third of a small picture. A page whose videos come and go takes the class `onewanPlayers.Group`.
(() => {
  function addButton(parent, kind) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = kind;
    parent.append(button);
    return button;
  }

  function single(video) {
    const button = addButton(video.parentElement, "");
    function label() {
      const text = video.paused ? "Play" : "Pause";
      button.textContent = text;
      button.setAttribute("aria-label", `${text} ${video.getAttribute("aria-label")}`);
      button.setAttribute("aria-pressed", String(!video.paused));
    }
    function toggle() {
      if (video.paused) video.play();
      else video.pause();
    }
    video.controls = false;
    video.addEventListener("click", toggle);
    video.addEventListener("play", label);
    video.addEventListener("pause", label);
    button.addEventListener("click", toggle);
    label();
  }

  // Resolves to whether the video can be played.
  function loaded(video) {
    // While it seeks, a video has its metadata alone; to load it again would begin at 0.
    if (video.readyState >= HTMLMediaElement.HAVE_METADATA) return Promise.resolve(true);
    return new Promise((done) => {
      video.addEventListener("loadeddata", () => done(true), { once: true });
      video.addEventListener("error", () => done(false), { once: true });
      video.preload = "auto";
      video.load();
    });
  }

  const groups = [];
  const LARGEST_DIFFERENCE = 0.04; // s, less than a frame at 24 per second

  class Group {
    // `bar` is the element of the controls, with data-name and data-fps; `list` gives the videos that
    // there are at the time.
    constructor(bar, list) {
      this.list = list;
      this.known = new WeakSet();
      this.videos = []; // those that are shown and can be played
      this.playing = false;
      this.rate = 1;
      this.fps = Number(bar.dataset.fps) || 16;
      this.button = addButton(bar, "");
      for (const [text, frames] of [["Frame back", -1], ["Frame on", 1]]) {
        const button = addButton(bar, "frame");
        button.textContent = text;
        button.addEventListener("click", () => this.move(frames));
      }
      this.slider = document.createElement("input");
      Object.assign(this.slider, { type: "range", min: 0, max: 1000, value: 0 });
      this.slider.setAttribute("aria-label", `time of the videos of ${bar.dataset.name}`);
      this.time = document.createElement("output");
      const speeds = document.createElement("select");
      speeds.setAttribute("aria-label", "speed");
      for (const rate of [0.25, 0.5, 1, 2]) speeds.append(new Option(`${rate}x`, rate, rate === 1, rate === 1));
      this.loop = Object.assign(document.createElement("input"), { type: "checkbox", checked: true });
      const loop = document.createElement("label");
      loop.append(this.loop, " loop");
      bar.append(this.slider, this.time, speeds, loop);
      this.button.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
      this.slider.addEventListener("input", () => this.seek());
      speeds.addEventListener("change", () => {
        this.rate = Number(speeds.value);
        for (const video of this.videos) video.playbackRate = this.rate;
      });
      groups.push(this);
      this.adopt();
    }

    // Take in the videos that there are now; if others play, new ones play with them.
    async adopt() {
      for (const video of this.list()) {
        if (this.known.has(video)) continue;
        this.known.add(video);
        video.controls = false;
        video.loop = false;
        video.addEventListener("click", () => this.button.click());
      }
      this.label();
      if (!this.playing) return;
      const old = new Set(this.videos);
      const time = this.longest?.currentTime ?? 0;
      await this.prepare();
      for (const video of old) if (!this.videos.includes(video)) video.pause();
      if (!this.playing || !this.longest) return;
      for (const video of this.videos) if (!old.has(video)) video.currentTime = Math.min(time, video.duration);
      await this.start();
    }

    label() {
      this.button.textContent = this.playing ? "Pause" : this.list().length === 1 ? "Play" : "Play together";
      this.button.setAttribute("aria-pressed", String(this.playing));
    }

    async prepare() {
      const shown = this.list().filter((video) => !video.closest("details:not([open])"));
      const good = await Promise.all(shown.map(loaded));
      shown.forEach((video, index) => video.parentElement.classList.toggle("broken", !good[index]));
      this.videos = shown.filter((_, index) => good[index]);
      this.longest = this.videos.reduce((a, b) => (a && a.duration >= b.duration ? a : b), null);
    }

    async play() {
      for (const other of groups) if (other !== this) other.pause();
      this.playing = true;
      this.label();
      await this.prepare();
      if (!this.longest || !this.playing) {
        this.pause();
        return;
      }
      if (this.longest.ended || this.longest.currentTime >= this.longest.duration - 0.01) this.place(0);
      else this.place(this.longest.currentTime);
      await this.start();
      const step = () => {
        if (!this.playing) return;
        if (this.longest.ended) {
          if (!this.loop.checked) {
            this.pause();
            return;
          }
          this.place(0);
          this.start();
        }
        this.follow();
        this.show();
        requestAnimationFrame(step);
      };
      requestAnimationFrame(step);
    }

    start() {
      return Promise.all(this.videos.map((video) => {
        video.playbackRate = this.rate;
        return video.play().catch(() => {});
      }));
    }

    pause() {
      if (!this.playing) return;
      this.playing = false;
      for (const video of this.videos) video.pause();
      if (this.longest) this.place(this.longest.currentTime);
      this.label();
    }

    place(time) {
      for (const video of this.videos) video.currentTime = Math.min(time, video.duration);
    }

    // A shorter video waits on its last frame for the longest one.
    follow() {
      const now = this.longest.currentTime;
      for (const video of this.videos) {
        if (video === this.longest || video.ended) continue;
        const wanted = Math.min(now, video.duration);
        if (Math.abs(video.currentTime - wanted) > LARGEST_DIFFERENCE * this.rate && !video.seeking) {
          video.currentTime = wanted;
        }
      }
    }

    async seek() {
      const share = Number(this.slider.value) / 1000;
      await this.still((longest) => share * longest.duration);
    }

    // To the middle of the frame that is so many after the present one.
    async move(frames) {
      await this.still((longest) => (Math.floor(longest.currentTime * this.fps + 0.01) + frames + 0.5) / this.fps);
    }

    // Pause at the time that `choose` gives for the longest video.
    async still(choose) {
      this.pause();
      await this.prepare();
      if (!this.longest) return;
      const time = Math.max(0, Math.min(choose(this.longest), this.longest.duration - 0.5 / this.fps));
      this.place(time);
      this.show(time);
    }

    show(time = this.longest.currentTime) {
      this.slider.value = String(Math.round((1000 * time) / this.longest.duration));
      this.time.textContent = `${time.toFixed(2)} of ${this.longest.duration.toFixed(2)} s`;
    }
  }

  globalThis.onewanPlayers = { Group };
  for (const element of document.querySelectorAll(".together")) {
    const videos = [...element.querySelectorAll("video")];
    if (videos.length) new Group(element.querySelector(".controls"), () => videos);
  }
  for (const video of document.querySelectorAll(".player video")) {
    if (!video.closest(".together")) single(video);
  }
})();

"use strict";
// A play button for each video, and a filter of the cards. The page can be used without it: videos
// then have the controls of the browser, which cover a third of a small picture.
(() => {
  const cards = [...document.querySelectorAll(".card")];
  const words = cards.map((card) => card.textContent.toLowerCase());
  for (const video of document.querySelectorAll("video")) {
    const button = document.createElement("button");
    button.type = "button";
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
    video.after(button);
  }

  const find = document.getElementById("find");
  if (!find) return;
  const noted = document.getElementById("noted");
  const shown = document.getElementById("shown");
  function filter() {
    const text = find.value.trim().toLowerCase();
    let number = 0;
    cards.forEach((card, index) => {
      card.hidden = !words[index].includes(text) || (noted.checked && !("noted" in card.dataset));
      if (card.hidden) card.querySelector("video")?.pause();
      else number += 1;
    });
    shown.textContent = number < cards.length ? `${number} of ${cards.length} clips` : "";
  }
  find.addEventListener("input", filter);
  noted.addEventListener("change", filter);
  filter(); // a browser keeps the values of fields when it loads a page again
})();

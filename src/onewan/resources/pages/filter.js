"use strict";
// Shows only the items whose text has the words of the search field. `#find` names the list that it
// searches in `data-list`; `#noted` leaves only those with notes.
(() => {
  const find = document.getElementById("find");
  if (!find) return;
  const cards = [...document.querySelectorAll(find.dataset.list)];
  const words = cards.map((card) => card.textContent.toLowerCase());
  const noted = document.getElementById("noted");
  const shown = document.getElementById("shown");
  function filter() {
    const text = find.value.trim().toLowerCase();
    let number = 0;
    cards.forEach((card, index) => {
      card.hidden = !words[index].includes(text) || (noted?.checked && !("noted" in card.dataset));
      if (card.hidden) card.querySelector("video")?.pause();
      else number += 1;
    });
    shown.textContent = number < cards.length ? `${number} of ${cards.length} clips` : "";
  }
  find.addEventListener("input", filter);
  noted?.addEventListener("change", filter);
  filter(); // a browser keeps the values of fields when it loads a page again
})();

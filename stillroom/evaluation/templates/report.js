"use strict";
// Filters the held-out items. The page is complete without it; the choice stands in the address, so it can be shared.
(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const STEP = 10;
  const cards = [...document.querySelectorAll("#items > article")];
  const text = new Map();
  const count = document.getElementById("shown");
  const more = document.getElementById("more");
  let limit = STEP;

  const searched = (card) => {
    if (!text.has(card)) text.set(card, card.textContent.toLowerCase());
    return text.get(card);
  };

  function show() {
    const { who, kind, category, q } = Object.fromEntries(new FormData(form));
    const words = q.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const card of cards) {
      const fits =
        (!who || card.dataset.who === who) &&
        (!kind || card.dataset.kind === kind) &&
        (!category || card.dataset.category === category) &&
        words.every((word) => searched(card).includes(word));
      card.hidden = !fits || ++found > limit;
    }
    const shown = Math.min(found, limit);
    count.textContent = `${shown} of ${found}` + (found < cards.length ? ` (${cards.length} in all)` : "");
    more.hidden = shown >= found;
  }

  function read() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (!location.hash.includes("=")) return;
    for (const name of ["who", "kind", "category", "q"]) form.elements[name].value = wanted.get(name) || "";
    document.getElementById("side-by-side").scrollIntoView();
  }

  function changed() {
    limit = STEP;
    const chosen = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    history.replaceState(null, "", `#${chosen}`);
    show();
  }

  form.hidden = false;
  form.addEventListener("input", changed);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(changed));
  more.addEventListener("click", () => { limit += 3 * STEP; show(); });
  addEventListener("hashchange", () => { read(); show(); });
  read();
  show();
})();

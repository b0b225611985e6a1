"use strict";
const cards = document.querySelectorAll(".card");
const show = (card) => {
  card.dataset.layer = card.querySelector("[type=radio]:checked").value;
  card.style.setProperty("--mix", card.querySelector("[type=range]").value / 100);
};
for (const card of cards) {
  card.addEventListener("input", () => show(card));
  show(card); // browsers keep what was chosen when a page is reloaded
}
// The controls above the cards set those of every card.
document.querySelector(".all")?.addEventListener("input", ({ target }) => {
  for (const card of cards) {
    for (const input of card.querySelectorAll("[type=" + target.type + "]")) {
      if (target.type === "range") input.value = target.value;
      else input.checked = input.value === target.value;
    }
    show(card);
  }
});

"use strict";
for (const slider of document.querySelectorAll(".slider input")) {
  const stops = slider.dataset.stops.split(" ");
  const figure = slider.closest("figure");
  const shown = slider.parentElement.querySelector("output");
  const draw = () => {
    const stop = stops[slider.value];
    shown.textContent = stop;
    slider.setAttribute("aria-valuetext", stop);
    for (const group of figure.querySelectorAll("[data-group]")) group.classList.toggle("off", group.dataset.group !== stop);
  };
  slider.addEventListener("input", draw);
  draw();
}
for (const map of document.querySelectorAll(".headmap")) {
  const cells = [...map.querySelectorAll(".cell")];
  const said = map.querySelector("output");
  const columns = Number(map.dataset.columns);
  const rows = cells.length / columns;
  let at = -1;
  const go = (to) => {
    if (at >= 0) cells[at].classList.remove("at");
    at = Math.max(0, Math.min(cells.length - 1, to));
    cells[at].classList.add("at");
    said.textContent = cells[at].dataset.say;
  };
  map.addEventListener("pointerover", (event) => {
    const cell = event.target.closest(".cell");
    if (cell) go(cells.indexOf(cell));
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -rows, ArrowRight: rows }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    go(at < 0 ? 0 : at + step);
  });
}

"use strict";
// Draws each figure's Vega-Lite specification over its static picture, which stays for print. A figure
// keeps its Vega view as `figure.view`; its buttons set the view's parameter `hidden`, a list of series.
const config = JSON.parse(document.getElementById("chart-config").textContent);

async function draw(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const place = figure.querySelector(".live");
  figure.classList.add("drawn");
  try {
    const { view } = await vegaEmbed(place, spec, {
      config, ast: true, renderer: "svg", actions: false, mode: "vega-lite",
      tooltip: { disableDefaultStyle: true },
    });
    figure.view = view;
  } catch (error) {
    figure.classList.remove("drawn");
    throw error;
  }
}

function toggle(button) {
  const on = button.getAttribute("aria-pressed") !== "true";
  button.setAttribute("aria-pressed", on);
  const figure = button.closest("figure");
  const off = [...figure.querySelectorAll("button[data-series][aria-pressed=false]")];
  figure.view?.signal("hidden", off.map((one) => one.dataset.series)).runAsync();
}

async function copy(button) {
  const text = document.getElementById(button.dataset.copies).textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(document.getElementById(button.dataset.copies));
    button.textContent = "Selected";
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.series !== undefined) toggle(button);
  if (button?.dataset.copies !== undefined) copy(button);
});

window.drawn = Promise.all([...document.querySelectorAll("figure.chart")].map(draw));

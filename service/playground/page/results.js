// What the model sees: classes as bars, or objects.

import { fill, find, make, show } from "./elements.js";
import { objectColour } from "./palette.js";
import { answerOf, store } from "./store.js";

let shown = null; // the answer that the list was made of

export function startResults() {
  const threshold = find("threshold");
  threshold.addEventListener("input", () => store.change({ threshold: Number(threshold.value) / 100 }));
  store.listen((now, changed) => {
    const answered = answerOf(now);
    if (answered?.result !== shown || changed.has("threshold")) list(answered);
    if (changed.has("lit")) light(now.lit);
  });
}

function list(answered) {
  shown = answered?.result;
  const place = find("results");
  show(find("results-panel"), Boolean(answered));
  show(find("threshold-row"), Boolean(shown?.detections));
  if (!shown) fill(place);
  else if (shown.predictions) fill(place, bars(shown.predictions));
  else fill(place, ...objects(shown.detections));
}

// What a model sees, in a word or two.
export function inShort({ predictions, detections }, threshold) {
  if (predictions) return predictions[0].label;
  const count = detections.filter(({ score }) => score >= threshold).length;
  return count === 1 ? "1 object" : `${count} objects`;
}

function bars(predictions) {
  const entries = predictions.map(({ label, score }) => {
    const bar = make("span", { class: "bar-fill" });
    bar.style.setProperty("inline-size", `${score * 100}%`);
    return make("li", { class: "bar-row" },
      make("span", { class: "bar-label", text: label }),
      make("span", { class: "bar", "aria-hidden": "true" }, bar),
      make("span", { class: "bar-value", text: percent(score) }),
    );
  });
  return make("ol", { class: "bars" }, ...entries);
}

function objects(detections) {
  const { threshold } = store.now;
  find("threshold").value = String(Math.round(threshold * 100));
  find("threshold-value").textContent = percent(threshold);
  const seen = detections
    .map((detection, index) => ({ ...detection, index }))
    .filter(({ score }) => score >= threshold);
  if (!seen.length) {
    const text = detections.length
      ? "No object has such a score. Move the slider to the left."
      : "The model found no object in this picture.";
    return [make("p", { class: "quiet", text })];
  }
  return [make("ul", { class: "objects" }, ...seen.map(object))];
}

// To hover or focus an object lights up what belongs to it in the picture.
function object({ label, score, index }) {
  const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.setProperty("background-color", objectColour(index));
  const light = () => store.change({ lit: index });
  const dim = () => store.now.lit === index && store.change({ lit: null });
  const button = make("button", {
    type: "button", class: "object", "data-index": index,
    onfocus: light, onblur: dim, onpointerenter: light, onpointerleave: dim, onclick: light,
  }, swatch, make("span", { text: label }), make("span", { class: "bar-value", text: percent(score) }));
  return make("li", {}, button);
}

function light(lit) {
  for (const button of document.querySelectorAll(".object")) {
    button.classList.toggle("is-lit", Number(button.dataset.index) === lit);
  }
}

export function percent(score) {
  return `${(score * 100).toFixed(score < 0.1 ? 1 : 0)} %`;
}

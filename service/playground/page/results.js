// What the model sees: classes as bars, or objects.

import { fill, find, make, show } from "./elements.js";
import { objectColour } from "./palette.js";
import { answerOf, store } from "./store.js";

let shown = null; // the answer that the list was made of

export function startResults() {
  const threshold = find("threshold");
  threshold.addEventListener("input", () => store.change({ threshold: Number(threshold.value) / 100 }));
  const opacity = find("opacity");
  opacity.addEventListener("input", () => store.change({ opacity: Number(opacity.value) / 100 }));
  store.listen((now, changed) => {
    const answered = answerOf(now);
    if (answered?.result !== shown || changed.has("threshold")) list(answered);
    if (changed.has("lit")) light(now.lit, answered);
    opacity.value = String(Math.round(now.opacity * 100));
    find("opacity-value").textContent = percent(now.opacity);
  });
}

function list(answered) {
  shown = answered?.result;
  const place = find("results");
  show(find("results-panel"), Boolean(answered));
  show(find("threshold-row"), Boolean(shown?.detections));
  show(find("opacity-row"), Boolean(shown?.segments));
  if (!shown) fill(place);
  else if (shown.predictions) fill(place, bars(shown.predictions));
  else if (shown.segments) fill(place, make("ul", { class: "objects" }, ...shown.segments.map(segment)));
  else fill(place, ...objects(shown.detections));
}

// What a model sees, in a word or two.
export function inShort({ predictions, detections, segments }, threshold) {
  if (predictions) return predictions[0].label;
  if (segments) return segments.slice(0, 2).map(({ label }) => label).join(", ");
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

function object({ label, score, index }) {
  return lighting(index, objectColour(index), label, percent(score));
}

function segment({ label, share, colour }, index) {
  return lighting(index, `rgb(${colour.join(" ")})`, label, percent(share));
}

// To hover or focus an object, or a class, lights up what belongs to it in the picture.
function lighting(index, colour, label, value) {
  const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.setProperty("background-color", colour);
  const light = () => store.change({ lit: index });
  const dim = () => store.now.lit === index && store.change({ lit: null });
  const button = make("button", {
    type: "button", class: "object", "data-index": index,
    onfocus: light, onblur: dim, onpointerenter: light, onpointerleave: dim, onclick: light,
  }, swatch, make("span", { text: label }), make("span", { class: "bar-value", text: value }));
  return make("li", {}, button);
}

function light(lit, answered) {
  const named = answered?.result.segments?.[lit] ?? null;
  show(find("under"), Boolean(named));
  if (named) {
    find("under-name").textContent = `${named.label}, ${percent(named.share)}`;
    find("under-swatch").style.setProperty("background-color", `rgb(${named.colour.join(" ")})`);
  }
  for (const button of document.querySelectorAll(".object")) {
    button.classList.toggle("is-lit", Number(button.dataset.index) === lit);
  }
}

export function percent(score) {
  return `${(score * 100).toFixed(score < 0.1 ? 1 : 0)} %`;
}

// The way of the request: where its time went.

import { fill, find, make, show } from "./elements.js";
import { answerOf, store } from "./store.js";

const STAGES = [
  ["way", "on the way", "The network, reading the body and writing the answer."],
  ["decode", "decode", "The picture's bytes become pixels at the model's size."],
  ["queue", "queue", "Waiting for the device."],
  ["compute", "compute", "The forward pass of the batch."],
  ["render", "render", "Reading the answer and drawing it, here in the browser."],
];
let told = null;

export function startTiming() {
  store.listen((now) => {
    const answered = answerOf(now);
    show(find("timing-panel"), Boolean(answered));
    if (!answered || answered.timing === told) return;
    told = answered.timing;
    list(answered, now.chosen);
  });
}

function list({ timing, model, version, result }, chosen) {
  const { stages, total, read } = timing;
  const server = ["decode", "queue", "compute"].reduce((sum, name) => sum + (stages[name] ?? 0), 0);
  const spent = { ...stages, way: Math.max(0, total - server), render: stages.render ?? read };
  const sum = STAGES.reduce((all, [name]) => all + (spent[name] ?? 0), 0);
  const parts = STAGES.map(([name]) => {
    const part = make("span", { class: `way-part way-${name}` });
    part.style.setProperty("flex-grow", String(Math.max(spent[name] ?? 0, sum / 200)));
    return part;
  });
  const batch = stages.batch ?? result.timing?.batch_size ?? 1;
  fill(find("timing-bar"), ...parts);
  fill(find("timing"), ...STAGES.map(([name, label, meaning]) =>
    make("li", { title: meaning },
      make("span", { class: `swatch way-${name}`, "aria-hidden": "true" }),
      make("span", { text: name === "compute" ? `compute, batch of ${batch}` : label }),
      make("span", { class: "bar-value", text: milliseconds(spent[name] ?? 0) }),
    )));
  const { width, height } = result.image;
  find("timing-said").textContent =
    `${milliseconds(sum)} in all. ${chosen.name}, ${width} x ${height} pixels; ${model}, version ${version}.`;
}

export function milliseconds(time) {
  return `${time < 10 ? time.toFixed(1) : Math.round(time)} ms`;
}

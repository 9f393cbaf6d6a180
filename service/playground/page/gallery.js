// The pictures of this visit: one is shown, the others stand below it.

import { fill, find, make, show } from "./elements.js";
import { inShort } from "./results.js";
import { answerOf, store } from "./store.js";

const WORDS = { waiting: "waiting", asking: "asking the server", failed: "failed" };
const thumbs = new Map(); // by picture, kept so that nothing flickers and the focus stays

export function startGallery({ choose }) {
  store.listen(({ items, chosen }, changed) => {
    if (!changed.has("items") && !changed.has("chosen")) return;
    show(find("gallery"), items.length > 1);
    if (items.length !== thumbs.size) {
      for (const item of items) if (!thumbs.has(item)) thumbs.set(item, thumbOf(item, choose));
      fill(find("gallery-items"), ...items.map((item) => thumbs.get(item).entry));
    }
    for (const item of items) update(item, thumbs.get(item), item === chosen);
    progress(items);
  });
}

function thumbOf(item, choose) {
  const image = item.shown
    ? make("img", { src: item.url, alt: "", class: "thumb-image" })
    : make("span", { class: "thumb-image thumb-broken", "aria-hidden": "true", text: "?" });
  const state = make("span", { class: "thumb-state" });
  const button = make("button", { type: "button", onclick: () => choose(item) },
    image, make("span", { class: "thumb-name", text: item.name }), state);
  return { entry: make("li", {}, button), button, state };
}

function update(item, { button, state }, chosen) {
  button.className = `thumb is-${item.state}`;
  button.title = item.failure?.message ?? item.name;
  if (chosen) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
  state.textContent = WORDS[item.state] ?? seen(item);
}

// What the chosen model said, or another one before it was chosen.
function seen(item) {
  const answered = answerOf({ chosen: item, model: store.now.model }) ?? [...item.answers.values()].at(-1);
  return answered ? inShort(answered.result, store.now.threshold) : "";
}

function progress(items) {
  const done = items.filter(({ state }) => state === "done").length;
  const failed = items.filter(({ state }) => state === "failed").length;
  const bar = find("gallery-progress");
  bar.max = Math.max(items.length, 1);
  bar.value = done + failed;
  find("gallery-said").textContent =
    `${done} of ${items.length} pictures done${failed ? `, ${failed} failed` : ""}.`;
}

// The pictures of this visit: one is shown, the others stand below it.

import { fill, find, make, show } from "./elements.js";
import { store } from "./store.js";

const WORDS = { waiting: "waiting", asking: "asking the server", done: "done", failed: "failed" };

export function startGallery({ choose }) {
  store.listen(({ items, chosen }, changed) => {
    if (!changed.has("items") && !changed.has("chosen")) return;
    show(find("gallery"), items.length > 1);
    const place = find("gallery-items");
    const focused = place.contains(document.activeElement) && document.activeElement.dataset.id;
    fill(place, ...items.map((item) => thumbnail(item, item === chosen, choose)));
    if (focused) place.querySelector(`[data-id="${focused}"]`)?.focus();
    progress(items);
  });
}

function thumbnail(item, chosen, choose) {
  const answer = [...item.answers.values()].at(-1);
  const best = item.state === "done" ? bestOf(answer) : WORDS[item.state];
  const image = item.shown
    ? make("img", { src: item.url, alt: "", class: "thumb-image" })
    : make("span", { class: "thumb-image thumb-broken", "aria-hidden": "true", text: "?" });
  const button = make("button", {
    type: "button", class: `thumb is-${item.state}`, "data-id": item.id,
    "aria-current": chosen ? "true" : null,
    title: item.failure?.message,
    onclick: () => choose(item),
  }, image, make("span", { class: "thumb-name", text: item.name }), make("span", { class: "thumb-state", text: best }));
  return make("li", {}, button);
}

function bestOf(answer) {
  const { predictions, detections } = answer?.result ?? {};
  if (predictions) return predictions[0].label;
  const count = detections?.filter(({ score }) => score >= store.now.threshold).length ?? 0;
  return count === 1 ? "1 object" : `${count} objects`;
}

function progress(items) {
  const done = items.filter(({ state }) => state === "done").length;
  const failed = items.filter(({ state }) => state === "failed").length;
  const bar = find("gallery-progress");
  bar.max = items.length;
  bar.value = done + failed;
  find("gallery-said").textContent =
    `${done} of ${items.length} pictures done${failed ? `, ${failed} failed` : ""}.`;
}

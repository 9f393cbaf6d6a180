// Where the model looks: which layer and groups are shown, and how far their points have moved.

import { fill, find, make, show } from "./elements.js";
import { layerName } from "./geometry.js";
import { groupColour } from "./palette.js";
import { answerOf, store } from "./store.js";

let layers = ""; // for which the choices were made

export function startLayers(stage) {
  const travel = find("travel");
  travel.addEventListener("input", () => {
    stage.stop();
    store.change({ travel: Number(travel.value) / 100 });
  });
  find("play").addEventListener("click", () => stage.play());
  const sized = find("sized");
  sized.addEventListener("change", () => store.change({ sized: sized.checked }));
  store.listen((now) => {
    const answered = answerOf(now);
    const found = answered?.layers ?? [];
    show(find("layers-panel"), found.length > 0);
    travel.value = String(Math.round(now.travel * 100));
    sized.checked = now.sized;
    const names = found.map(layerName).join();
    const key = `${now.model?.name} ${names} ${now.layer}`;
    if (found.length && key !== layers) {
      layers = key;
      listLayers(found, now.layer);
      listGroups(found.find((layer) => layerName(layer) === now.layer), now.hidden);
    }
  });
}

function listLayers(found, chosen) {
  const place = find("layer-choices");
  const focused = place.contains(document.activeElement);
  fill(place, ...found.map((layer) => {
    const name = layerName(layer);
    const input = make("input", {
      type: "radio", name: "layer", value: name, class: "chip-input",
      "aria-label": `Stage ${layer.stage}, block ${layer.block}`,
      onchange: () => store.change({ layer: name }),
    });
    input.checked = name === chosen;
    return make("label", { class: "chip" }, input, make("span", { text: name, "aria-hidden": "true" }));
  }));
  if (focused) place.querySelector("input:checked")?.focus();
}

function listGroups(layer, hidden) {
  const count = layer?.sampling_locations.length ?? 0;
  fill(find("group-choices"), ...Array.from({ length: count }, (_, group) => {
    const input = make("input", {
      type: "checkbox", value: String(group), class: "chip-input",
      "aria-label": `Offset group ${group}`,
      onchange: () => {
        const others = new Set(store.now.hidden);
        if (input.checked) others.delete(group);
        else others.add(group);
        store.change({ hidden: others });
      },
    });
    input.checked = !hidden.has(group);
    const dot = make("span", { class: "dot", "aria-hidden": "true" });
    dot.style.setProperty("background-color", groupColour(group));
    return make("label", { class: "chip" }, input, dot, make("span", { text: String(group), "aria-hidden": "true" }));
  }));
}

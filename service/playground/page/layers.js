// Where the model looks: which layer and groups are shown, and how far their points have moved.

import { fill, find, make, show } from "./elements.js";
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
    const names = answered?.layerNames ?? [];
    show(find("layers-panel"), names.length > 0);
    travel.value = String(Math.round(now.travel * 100));
    sized.checked = now.sized;
    const groups = answered?.groupsOf(now.layer) ?? 0; // of a layer of windows known with its attention
    const key = `${now.model?.name} ${names} ${now.layer} ${groups}`;
    if (names.length && key !== layers) {
      layers = key;
      const hasPoints = answered.layers.length > 0;
      show(find("travel-row"), hasPoints);
      show(find("sized-row"), hasPoints);
      show(find("no-points"), !hasPoints);
      find("no-points-model").textContent = now.model.name;
      find("groups-title").textContent = hasPoints ? "Offset groups" : "Heads";
      listLayers(names, now.layer);
      listGroups(groups, { hidden: now.hidden, hasPoints });
    }
  });
}

function listLayers(names, chosen) {
  const place = find("layer-choices");
  const focused = place.contains(document.activeElement);
  fill(place, ...names.map((name) => {
    const [stage, block] = name.split(".");
    const input = make("input", {
      type: "radio", name: "layer", value: name, class: "chip-input",
      "aria-label": `Stage ${stage}, block ${block}`,
      onchange: () => store.change({ layer: name }),
    });
    input.checked = name === chosen;
    return make("label", { class: "chip" }, input, make("span", { text: name, "aria-hidden": "true" }));
  }));
  if (focused) place.querySelector("input:checked")?.focus();
}

function listGroups(count, { hidden, hasPoints }) {
  fill(find("group-choices"), ...Array.from({ length: count }, (_, group) => {
    const input = make("input", {
      type: "checkbox", value: String(group), class: "chip-input",
      "aria-label": `${hasPoints ? "Offset group" : "Head"} ${group}`,
      onchange: () => {
        const others = new Set(store.now.hidden);
        if (input.checked) others.delete(group);
        else others.add(group);
        store.change({ hidden: others });
      },
    });
    input.checked = !hidden.has(group);
    // The heads of a window share its cells, and one colour.
    const dot = hasPoints ? make("span", { class: "dot", "aria-hidden": "true" }) : null;
    dot?.style.setProperty("background-color", groupColour(group));
    return make("label", { class: "chip" }, input, dot, make("span", { text: String(group), "aria-hidden": "true" }));
  }));
}

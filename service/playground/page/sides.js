// A picture as one model sees it. The page shows one such side, or two to compare.

import { answerOf, store } from "./store.js";

const NONE = new Set();

class Side {
  // `part` of the store names the model; `chooseLayer` says which of its layers is shown.
  constructor(part, chooseLayer) {
    this.part = part;
    this.chooseLayer = chooseLayer;
  }

  get model() {
    return store.now[this.part];
  }

  get answered() {
    return answerOf(store.now, this.model);
  }

  get layer() {
    return this.chooseLayer(this.answered);
  }

  // The groups that are not shown, which are chosen among those of the first model.
  get hidden() {
    return this.part === "model" ? store.now.hidden : NONE;
  }

  // The cells of the layer that is shown; null while they are not known.
  get grid() {
    return this.answered?.grids.get(this.layer) ?? null;
  }

  // What was answered for the query that is chosen; null while it is asked for.
  get query() {
    const { query } = store.now;
    const { grid } = this;
    return query && grid ? this.answered.query(this.layer, grid.nearest(query)) : null;
  }

  // Whether there is nothing to ask for what is chosen.
  get isTold() {
    return Boolean(this.grid && (!store.now.query || this.query));
  }

  // The call and the answer that told of what is shown.
  get exchange() {
    return this.answered?.exchange(this.layer, this.query) ?? null;
  }
}

// What is chosen may be a layer of the model before.
export const first = new Side("model", (answered) =>
  answered?.layerNames.includes(store.now.layer) ? store.now.layer : null);
export const second = new Side("beside", (answered) => answered && alike(answered.layerNames, store.now.layer));

// The calls that told of what is shown, with their answers.
export function shownExchanges() {
  const exchanges = [first, second].map((side) => side.exchange);
  return exchanges[0] ? exchanges.filter(Boolean) : [];
}

// The layer of another model that is most like one: the same, the last of its stage, or the last.
function alike(names, layer) {
  const stage = `${layer}`.split(".")[0];
  if (names.includes(layer)) return layer;
  return names.findLast((name) => name.startsWith(`${stage}.`)) ?? names.at(-1) ?? null;
}

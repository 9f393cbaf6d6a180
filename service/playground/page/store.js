// What the page knows, and who wants to hear of changes.

export class Store {
  constructor(initial) {
    this.now = initial;
    this.listeners = [];
  }

  // Listeners are told what is known and which parts of it changed.
  listen(listener) {
    this.listeners.push(listener);
  }

  change(parts) {
    this.now = { ...this.now, ...parts };
    const changed = new Set(Object.keys(parts));
    for (const listener of this.listeners) listener(this.now, changed);
  }

  // Something inside of a part is another one.
  touch(...parts) {
    this.change(Object.fromEntries(parts.map((part) => [part, this.now[part]])));
  }
}

export const store = new Store({
  facts: null, // of the server
  models: [],
  model: null, // the chosen one
  beside: null, // a model that is compared with it
  items: [], // pictures, see pictures.js
  chosen: null, // the one that is shown
  layer: null, // as stage.block
  hidden: new Set(), // offset groups
  travel: 1, // of the points, from their references (0) to where the model read (1)
  sized: true, // circles by the attention received
  threshold: 0.5, // least score of an object
  query: null, // [x, y] in pixels of the picture
  opacity: 0.5, // of the labels of a segmenter
  lit: null, // index of a detection, or of a segment
});

// What the model said of the chosen picture; null where nothing was said yet.
export function answerOf({ chosen, model: first }, model = first) {
  return (model && chosen?.answers.get(model.name)) ?? null;
}

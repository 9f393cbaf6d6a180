// Asks the server about pictures, and keeps what was answered.

import { ask } from "./api.js";
import { makeCall } from "./calls.js";
import { Grid, layerName } from "./geometry.js";
import { patiently } from "./patience.js";
import { Labels } from "./segments.js";

// What a model said of a picture. Attention is asked for layer by layer and query by query.
class Answered {
  constructor(answer, { explained_layers: explained }) {
    this.explained = explained;
    this.exchanges = new Map(); // call and answer that told of a layer, or of a layer and a cell
    this.first = answer;
    this.result = answer.result;
    this.model = answer.model;
    this.version = answer.version;
    this.timing = answer.timing;
    this.layers = answer.result.points ?? [];
    this.labels = answer.result.segments ? new Labels(answer.result) : null;
    this.grids = new Map(); // by layer
    this.received = new Map();
    this.queries = new Map(); // by layer and cell
  }

  // Those with points; of a model without, those whose attention it explains.
  get layerNames() {
    return this.layers.length ? this.layers.map(layerName) : this.explained;
  }

  // How many offset groups a layer has, or heads where it has no points.
  groupsOf(name) {
    const layer = this.layers.find((one) => layerName(one) === name);
    return layer?.sampling_locations.length ?? this.received.get(name)?.length ?? 0;
  }

  // `corners`: whether the last two queries stand in corners of the picture.
  keep(answer, corners) {
    this.timing = answer.timing;
    for (const layer of answer.result.attention ?? []) {
      const name = layerName(layer);
      this.received.set(name, layer.received);
      if (!this.exchanges.has(name)) this.exchanges.set(name, answer);
      if (corners) this.grids.set(name, new Grid(...layer.queries.slice(-2)));
      for (const query of layer.queries) {
        this.queries.set(cellName(name, query), query);
        this.exchanges.set(cellName(name, query), answer);
      }
    }
  }

  query(layer, cell) {
    return this.queries.get(cellName(layer, cell)) ?? null;
  }

  // The call and the answer that told of what is shown: a layer, and a cell if one is chosen.
  exchange(layer, cell) {
    const ofCell = cell && this.exchanges.get(cellName(layer, cell));
    return ofCell ?? this.exchanges.get(layer) ?? this.first;
  }
}

function cellName(layer, { row, column }) {
  return `${layer} ${row} ${column}`;
}

// The queries of a first call: one, and those in two corners, from which the cells of a map follow.
function withCorners(item, query) {
  if (!item.size) return null;
  const [width, height] = item.size;
  return [query ?? [width / 2, height / 2], [0, 0], [width, height]];
}

// Ask about a picture for the first time. Waits as long as the server is busy.
export async function askAbout(item, model, wishes) {
  const { query, signal, waiting } = wishes;
  const layer = model.explained_layers.includes(wishes.layer) ? wishes.layer : null;
  const queries = withCorners(item, query);
  // A model without attention has an answer all the same.
  const explain = model.explained_layers.length ? "attention" : "none";
  const call = makeCall(model, item, { explain, queries, layer });
  let answer;
  try {
    answer = await patiently(() => ask(call, item.file, signal), { signal, waiting });
  } catch (failure) {
    if (failure.code !== "invalid_option" || !query) throw failure;
    return askAbout(item, model, { ...wishes, query: null }); // the place is of another picture
  }
  const answered = new Answered(answer, model);
  answered.keep(answer, queries !== null);
  item.answers.set(model.name, answered);
  return answered;
}

// Asks what a place attends to: one question at a time, and of those that came meanwhile the last.
export class Curiosity {
  constructor({ answered, failed, waiting }) {
    this.answered = answered;
    this.failed = failed;
    this.waiting = waiting;
    this.next = null;
    this.busy = false;
  }

  ask(item, model, layer, query) {
    this.next = { item, model, layer, query, begun: performance.now() };
    if (!this.busy) this.run();
  }

  forget() {
    this.next = null;
  }

  async run() {
    this.busy = true;
    while (this.next) {
      const question = this.next;
      this.next = null;
      try {
        await this.answer(question);
        this.answered(question);
      } catch (failure) {
        if (failure.name !== "AbortError") this.failed(failure);
      }
    }
    this.busy = false;
  }

  async answer({ item, model, layer, query }) {
    const known = item.answers.get(model.name);
    const corners = !known.grids.has(layer) && item.size !== null;
    const queries = corners ? withCorners(item, query) : query && [query];
    const call = makeCall(model, item, { queries, layer });
    const answer = await patiently(() => ask(call, item.file), { waiting: this.waiting });
    known.keep(answer, corners);
  }
}

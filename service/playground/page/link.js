// A link that restores what is shown. It holds all but pictures of people's own, which stay with them.

import { nameOf } from "./intake.js";
import { store } from "./store.js";

const SETTLED_MS = 250;
let timer = 0;

export function startLink() {
  store.listen(() => {
    clearTimeout(timer);
    timer = setTimeout(writeLink, SETTLED_MS);
  });
}

// Put the state into the address of the page, behind the #, which no server sees.
export function writeLink() {
  clearTimeout(timer);
  const { chosen, model, beside, layer, hidden, travel, sized, threshold, opacity, query } = store.now;
  if (!chosen || !model) return;
  const parts = { model: model.name, layer, score: threshold, travel: travel.toFixed(2) };
  if (chosen.sample) parts.sample = nameOf(chosen.sample);
  if (model.task === "segment") parts.opacity = opacity;
  if (beside) parts.beside = beside.name;
  if (query) parts.query = query.map((value) => value.toFixed(1)).join(",");
  if (hidden.size) parts.hidden = [...hidden].sort().join(",");
  if (!sized) parts.sized = "no";
  const written = Object.entries(parts)
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${name}=${encodeURIComponent(value).replaceAll("%2C", ",")}`);
  history.replaceState(null, "", `#${written.join("&")}`);
}

// What the address says; what it does not say, or says wrongly, is absent.
export function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  const numbers = (name) => (given.get(name) ?? "").split(",").filter(Boolean).map(Number);
  const share = (name) => {
    const value = Number(given.get(name) || NaN);
    return value >= 0 && value <= 1 ? value : undefined;
  };
  const query = numbers("query");
  const state = {
    travel: share("travel"),
    threshold: share("score"),
    opacity: share("opacity"),
    layer: given.get("layer") ?? undefined,
    query: query.length === 2 && query.every((value) => value >= 0) ? query : undefined,
    hidden: new Set(numbers("hidden").filter(Number.isInteger)),
    sized: given.get("sized") !== "no",
  };
  return {
    empty: !location.hash.slice(1),
    sample: given.get("sample"),
    model: given.get("model"),
    beside: given.get("beside"),
    state: Object.fromEntries(Object.entries(state).filter(([, value]) => value !== undefined)),
  };
}

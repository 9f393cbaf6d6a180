// What the chosen place attends to, in words and as bars, for each model that is shown.

import { fill, find, make, show } from "./elements.js";
import { cellsOf } from "./geometry.js";
import { groupColour } from "./palette.js";
import { first, second } from "./sides.js";
import { store } from "./store.js";

const LISTED = 5;

export function startAttention() {
  find("forget-query").addEventListener("click", () => store.change({ query: null }));
  const told = new Map(); // by side: what was last told
  store.listen((now) => {
    show(find("attention-panel"), Boolean(first.grid));
    show(find("forget-query"), Boolean(now.query));
    show(find("attention-hint"), !now.query);
    show(find("beside-attention"), Boolean(now.beside && second.query));
    find("beside-name").textContent = now.beside?.name ?? "";
    for (const [side, prefix] of [[first, ""], [second, "beside-"]]) {
      const { query, hidden } = side;
      const before = told.get(side);
      if (before && before.query === query && before.hidden === hidden) continue;
      told.set(side, { query, hidden });
      tell(query, side, prefix);
    }
  });
}

function tell(query, { hidden, answered }, prefix) {
  const listed = find(`${prefix}attention-bars`);
  const said = find(`${prefix}attention-said`);
  const keys = query ? (query.window ? cells(query, hidden) : points(query)) : [];
  if (!keys.length) {
    fill(listed);
    said.textContent = "";
    return;
  }
  const heaviest = keys[0].weight || 1;
  const entries = keys.slice(0, LISTED).map(({ name, colour, weight }) => {
    const bar = make("span", { class: "bar-fill" });
    bar.style.setProperty("inline-size", `${(weight / heaviest) * 100}%`);
    bar.style.setProperty("background-color", colour);
    return make("li", { class: "bar-row" },
      make("span", { class: "bar-label", text: name }),
      make("span", { class: "bar", "aria-hidden": "true" }, bar),
      make("span", { class: "bar-value", text: weight.toFixed(2) }),
    );
  });
  fill(listed, make("ol", { class: "bars" }, ...entries));
  const sentence = `Row ${query.row}, column ${query.column}${labelled(query, answered)} ${keys[0].sentence}.`;
  if (said.textContent !== sentence) said.textContent = sentence;
}

// The class of a place, of a model that labels pixels.
function labelled({ centre }, { labels }) {
  const index = labels?.at(centre) ?? null;
  return index === null ? "" : `, which is labelled ${labels.segments[index].label},`;
}

// The keys of a query, best first, with what is said of each.
function points(query) {
  return query.groups
    .flatMap((group, index) => group.map((key) => ({ ...key, group: index })))
    .sort((a, b) => b.weight - a.weight)
    .map(({ key, group, weight, point }) => ({
      name: `point ${key}, group ${group}`,
      colour: groupColour(group),
      weight,
      sentence: `attends most to point ${key} of group ${group}, at ${at(point)}, with weight ${weight.toFixed(2)}`,
    }));
}

function cells(query, hidden) {
  const found = cellsOf(query, hidden);
  const heads = query.groups.length - hidden.size;
  return found.map(({ weight, point }) => ({
    name: `cell at ${at(point)}`,
    colour: groupColour(0),
    weight,
    sentence:
      `sees the cells of its window, and attends most to the one at ${at(point)}, ` +
      `with weight ${weight.toFixed(2)} of ${heads} ${heads === 1 ? "head" : "heads"}`,
  }));
}

function at(point) {
  return point.map(Math.round).join(", ");
}

// What the chosen place attends to, in words and as bars.

import { fill, find, make, show } from "./elements.js";
import { groupColour } from "./palette.js";
import { shownGrid, shownQuery } from "./stage.js";
import { store } from "./store.js";

const LISTED = 5;
let told = null;

export function startAttention() {
  find("forget-query").addEventListener("click", () => store.change({ query: null }));
  store.listen((now) => {
    const grid = shownGrid();
    const query = shownQuery();
    show(find("attention-panel"), Boolean(grid));
    show(find("forget-query"), Boolean(now.query));
    show(find("attention-hint"), !now.query);
    if (query === told) return;
    told = query;
    if (!query) {
      fill(find("attention"));
      find("attention-said").textContent = "";
      return;
    }
    list(query);
  });
}

function list(query) {
  const keys = query.groups
    .flatMap((group, index) => group.map((key) => ({ ...key, group: index })))
    .sort((a, b) => b.weight - a.weight);
  const heaviest = keys[0].weight || 1;
  const entries = keys.slice(0, LISTED).map(({ key, group, weight }) => {
    const bar = make("span", { class: "bar-fill" });
    bar.style.setProperty("inline-size", `${(weight / heaviest) * 100}%`);
    bar.style.setProperty("background-color", groupColour(group));
    return make("li", { class: "bar-row" },
      make("span", { class: "bar-label", text: `point ${key}, group ${group}` }),
      make("span", { class: "bar", "aria-hidden": "true" }, bar),
      make("span", { class: "bar-value", text: weight.toFixed(2) }),
    );
  });
  fill(find("attention"), make("ol", { class: "bars" }, ...entries));
  const { key, group, weight, point } = keys[0];
  const [x, y] = point.map(Math.round);
  find("attention-said").textContent =
    `Row ${query.row}, column ${query.column} attends most to point ${key} of group ${group}, ` +
    `at ${x}, ${y}, with weight ${weight.toFixed(2)}.`;
}

// A second model beside the first: it is asked about the same picture, and the same place, at the same
// time.

import { askAbout } from "./asking.js";
import { fill, find, make, show } from "./elements.js";
import { Failure } from "./failures.js";
import { inShort } from "./results.js";
import { first, second } from "./sides.js";
import { store } from "./store.js";

const NOTHING = "";
let stopping = null; // what ends the question that is asked
let failed = null; // why the last one failed: { item, model, failure }

// `waiting` as in patience.js; `isLive` says whether somebody else asks, as a camera does.
export function startBeside({ waiting, isLive }) {
  find("beside").addEventListener("change", (event) => compare(event.target.value));
  find("waiting-stop").addEventListener("click", () => stopping?.abort());
  store.listen((now, changed) => {
    if (changed.has("models") || changed.has("model")) list(now);
    find("beside").value = now.beside?.name ?? NOTHING;
    frame(now);
    if ((changed.has("chosen") || changed.has("beside")) && !isLive()) ask(now, waiting);
  });
}

// Compare with the model of a name; none ends it.
export function compare(name) {
  const others = store.now.models.filter((model) => model !== store.now.model);
  store.change({ beside: others.find((model) => model.name === name) ?? null });
}

function list({ models, model }) {
  const others = models.filter((one) => one !== model);
  show(find("beside-choice"), others.length > 0);
  fill(find("beside"),
    make("option", { value: NOTHING, text: "nothing" }),
    ...others.map(({ name }) => make("option", { value: name, text: name })));
}

function frame({ chosen, beside }) {
  const readable = Boolean(chosen?.shown);
  show(find("welcome"), !chosen);
  show(find("stage"), Boolean(chosen));
  show(find("unreadable"), Boolean(chosen) && !readable);
  const two = Boolean(beside) && readable;
  find("plates").classList.toggle("are-two", two);
  show(find("beside-plate"), two);
  show(find("caption"), two);
  if (!two) return;
  find("caption").textContent = caption(first);
  find("beside-caption").textContent = caption(second);
}

function caption(side) {
  const { answered, model, layer, grid } = side;
  const { chosen } = store.now;
  const failure = side === first ? chosen.failure : failureOf(chosen, model);
  if (failure) return failure.message;
  if (!answered) return `Asking ${model?.name}`;
  const where = grid ? `layer ${layer}` : "no attention to show";
  return `${model.name}, ${where}: ${inShort(answered.result, store.now.threshold)}`;
}

function failureOf(item, model) {
  return failed?.item === item && failed.model === model ? failed.failure : null;
}

async function ask({ chosen, beside, query, facts }, waiting) {
  stopping?.abort();
  stopping = failed = null;
  if (!chosen || !beside || chosen.answers.has(beside.name) || chosen.refusal(facts)) return;
  const mine = new AbortController();
  stopping = mine;
  try {
    await askAbout(chosen, beside, { query, layer: null, signal: mine.signal, waiting });
    store.touch("beside");
  } catch (failure) {
    if (stopping !== mine) return; // something else is asked now
    failed = { item: chosen, model: beside, failure: failure.name === "AbortError" ? new Failure("stopped") : failure };
    store.change({ heard: {} });
  }
}

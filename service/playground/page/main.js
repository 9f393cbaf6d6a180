// Puts the page together.

import { facts as askForFacts, models as askForModels } from "./api.js";
import { Curiosity, askAbout } from "./asking.js";
import { startAttention } from "./attention.js";
import { knows } from "./calls.js";
import { compare, startBeside } from "./beside.js";
import { Camera } from "./camera.js";
import { startDownload } from "./download.js";
import { fill, find, make, show } from "./elements.js";
import { Failure } from "./failures.js";
import { startGallery } from "./gallery.js";
import { fetchSample, nameOf, startIntake } from "./intake.js";
import { startLayers } from "./layers.js";
import { readLink, startLink } from "./link.js";
import { tell, tellFailure, tellWaiting } from "./notices.js";
import { patiently } from "./patience.js";
import { startResults } from "./results.js";
import { startSharing } from "./sharing.js";
import { first, second } from "./sides.js";
import { Stage } from "./stage.js";
import { answerOf, store } from "./store.js";
import { startTiming } from "./timing.js";

const AT_ONCE = 3; // pictures that are asked about at a time
const TELLS = { classify: "classes", detect: "objects", segment: "pixels" };
const RETOLD = ["query", "layer", "chosen", "model", "beside"];

const stage = new Stage(first);
const stages = [stage, new Stage(second, "beside-")];
const camera = new Camera({ failed: tellFailure, waiting: tellWaiting });
// One for each side, so that both are asked at the same time.
const curious = new Map(
  [first, second].map((side) => [side, new Curiosity({ answered, failed: tellFailure, waiting: tellWaiting })]),
);
const running = new Map(); // what stops the question about a picture
let restored = {}; // what a link says of the first picture

const intake = startIntake({ take, failed: tellFailure });
startResults();
startLayers(stage);
startAttention();
startTiming();
startSharing();
startGallery({ choose });
startDownload(stages);
startBeside({ waiting: tellWaiting, isLive: () => camera.on });
store.listen(wonder);
find("waiting-stop").addEventListener("click", stopAll);
find("model").addEventListener("change", (event) => {
  chooseModel(store.now.models.find(({ name }) => name === event.target.value));
});
start();

async function start() {
  try {
    const waiting = { waiting: tellWaiting };
    const facts = await patiently(askForFacts, waiting);
    intake.listSamples(facts.samples);
    const models = (await patiently(askForModels, waiting)).filter(({ task }) => knows(task));
    store.change({ facts, models });
    listModels(models);
    show(find("main"), true);
    await restore(facts, models);
    startLink();
    document.body.dataset.ready = "yes";
  } catch (failure) {
    tellFailure(failure, { again: () => location.reload() });
  }
}

function listModels(models) {
  if (!models.length) {
    tell("this server has no model whose answers this page can show");
    return;
  }
  fill(find("model"), ...models.map(({ name, task }) =>
    make("option", { value: name, text: `${name} (${TELLS[task]})` })));
  setModel(models.find((model) => model.default) ?? models[0]);
}

function setModel(model) {
  find("model").value = model.name;
  const { beside } = store.now;
  store.change({ model, beside: beside === model ? null : beside });
}

async function restore(facts, models) {
  const link = readLink();
  const model = models.find(({ name }) => name === link.model);
  if (model) setModel(model);
  if (link.empty) return;
  compare(link.beside);
  const { query, layer, travel, ...view } = link.state;
  store.change(view);
  restored = { query, layer, travel };
  const sample = facts.samples.find((one) => nameOf(one) === link.sample);
  if (sample) take([await fetchSample(sample)], { keepModel: Boolean(model) });
  else tell("the picture of this link is its maker's own. Choose one to see it in this way");
}

// Take pictures in: show the first, ask about all.
async function take(pictures, { keepModel = false } = {}) {
  if (!store.now.facts) return; // not before the server has answered
  camera.stop();
  tell("");
  tellFailure(null);
  const { sample } = pictures[0];
  if (sample && !keepModel && !sample.tasks.includes(store.now.model?.task)) {
    const fitting = store.now.models.filter(({ task }) => sample.tasks.includes(task));
    const model = fitting.find((one) => one.default) ?? fitting[0];
    if (model) setModel(model);
  }
  find("reading").open = false;
  await Promise.all(pictures.map((picture) => picture.open()));
  store.change({ items: [...store.now.items, ...pictures] });
  choose(pictures[0]);
  askAll(pictures);
}

function choose(item) {
  camera.stop();
  store.change({ chosen: item, query: null, lit: null });
  show(find("asking"), item.state === "asking");
  tellFailureOf(item);
  if (item.state === "done" && !answerOf(store.now)) askAll([item]);
  else if (answerOf(store.now)) settle(item);
}

function chooseModel(model) {
  setModel(model);
  store.change({ query: null, lit: null });
  const { chosen } = store.now;
  if (!chosen || camera.on) return;
  if (answerOf(store.now)) settle(chosen);
  else askAll([chosen]);
}

// Ask about pictures, a few at a time, so that one that fails or waits holds up no other.
async function askAll(pictures) {
  const left = [...pictures];
  const { model } = store.now;
  for (const picture of left) update(picture, "waiting");
  const work = async () => {
    while (left.length) await askOne(left.shift(), model);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}

async function askOne(item, model) {
  if (!model) return;
  const refused = item.refusal(store.now.facts);
  if (refused) {
    update(item, "failed", refused);
    return;
  }
  running.get(item)?.abort(); // of a model that was chosen before
  const stopping = new AbortController();
  const isLast = () => running.get(item) === stopping;
  running.set(item, stopping);
  update(item, "asking");
  const wishes = { query: null, layer: store.now.layer, ...restored };
  try {
    await askAbout(item, model, { ...wishes, signal: stopping.signal, waiting: tellWaiting });
    if (!isLast()) return;
    update(item, "done");
    if (item === store.now.chosen && model === store.now.model) settle(item, { isFirst: true });
  } catch (failure) {
    if (!isLast()) return;
    update(item, "failed", failure.name === "AbortError" ? new Failure("stopped") : failure);
  } finally {
    if (isLast()) running.delete(item);
  }
}

function update(item, state, failure = null) {
  item.state = state;
  item.failure = failure;
  if (item === store.now.chosen) {
    show(find("asking"), state === "asking");
    tellFailureOf(item);
  }
  store.touch("items");
}

function tellFailureOf(item) {
  tellFailure(item.failure, { again: item.failure?.mayPass ? () => askAll([item]) : null });
}

// Choose a layer that the answer has, and let the points move there when they are seen first.
function settle(item, { isFirst = false } = {}) {
  show(find("asking"), false);
  const answered = answerOf(store.now);
  const { layer } = store.now;
  const wanted = restored.layer ?? layer;
  const names = answered.layerNames;
  const query = restored.query ?? store.now.query;
  const chosen = names.includes(wanted) ? wanted : ([...answered.grids.keys()].at(-1) ?? names.at(-1) ?? null);
  store.change({ layer: chosen, query: item.size && answered.grids.size ? query : null });
  if (isFirst && names.length) {
    if (restored.travel === undefined) stage.play();
    else store.change({ travel: restored.travel });
  }
  restored = {};
}

// Ask for what is chosen and not known yet, of each model that is shown: a layer's attention, or a
// query's.
function wonder(now, changed) {
  if (!RETOLD.some((part) => changed.has(part)) || camera.on) return;
  for (const [side, curiosity] of curious) {
    const { answered, model, layer } = side;
    if (!answered?.grids.size || !layer || side.isTold) curiosity.forget();
    else curiosity.ask(now.chosen, model, layer, now.query);
  }
}

function answered({ begun }) {
  tellFailure(null);
  store.change({ heard: {} });
  // The stage draws in the next frame.
  requestAnimationFrame(() => {
    stage.element.dataset.answeredMs = (performance.now() - begun).toFixed(1);
  });
}

function stopAll() {
  for (const stopping of running.values()) stopping.abort();
  camera.stop();
}

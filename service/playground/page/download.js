// What is shown, as a file.

import { draw } from "./drawing.js";
import { find, make } from "./elements.js";
import { shownExchanges } from "./sides.js";
import { store } from "./store.js";

const LONGEST = 4096; // pixels of a file's side

const GAP = 16; // pixels of a screen between two pictures

// `stages`: the first one, and the one beside it.
export function startDownload(stages) {
  find("save-png").addEventListener("click", async () => {
    const { chosen } = store.now;
    const shown = stages.filter(({ side }) => side.answered);
    save(await png(shown, chosen), `${stem(chosen)}-points.png`);
  });
  find("save-json").addEventListener("click", () => {
    const bodies = shownExchanges().map(({ body }) => body);
    const text = JSON.stringify(bodies.length > 1 ? bodies : bodies[0], null, 2);
    save(new Blob([text], { type: "application/json" }), `${stem(store.now.chosen)}.json`);
  });
}

// The picture at its own size, with what is drawn over it as large, relatively, as on the screen; once
// for each model that is shown.
async function png(stages, item) {
  const scale = Math.min(1, LONGEST / Math.max(...item.size));
  const [width, height] = item.size.map((side) => Math.round(side * scale));
  const unit = width / stages[0].element.getBoundingClientRect().width;
  const gap = Math.round(GAP * unit);
  const file = canvasOf(stages.length * (width + gap) - gap, height);
  const context = file.getContext("2d");
  const picture = await whole(item);
  stages.forEach((stage, index) => {
    const overlay = canvasOf(width, height);
    draw(overlay.getContext("2d"), stage.view(width / item.size[0], unit));
    context.drawImage(picture, index * (width + gap), 0, width, height);
    context.drawImage(overlay, index * (width + gap), 0);
  });
  return new Promise((resolve) => {
    file.toBlob(resolve, "image/png");
  });
}

function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

async function whole(item) {
  const image = new Image();
  image.src = URL.createObjectURL(item.file);
  await image.decode();
  URL.revokeObjectURL(image.src);
  return image;
}

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function stem(item) {
  return item.name.replace(/\.\w+$/, "");
}

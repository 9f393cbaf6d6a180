// What is shown, as a file.

import { draw } from "./drawing.js";
import { find, make } from "./elements.js";
import { shownExchange } from "./stage.js";
import { store } from "./store.js";

const LONGEST = 4096; // pixels of a file's side

export function startDownload(stage) {
  find("save-png").addEventListener("click", async () => {
    const { chosen } = store.now;
    save(await png(stage, chosen), `${stem(chosen)}-points.png`);
  });
  find("save-json").addEventListener("click", () => {
    const { body } = shownExchange();
    const text = JSON.stringify(body, null, 2);
    save(new Blob([text], { type: "application/json" }), `${stem(store.now.chosen)}.json`);
  });
}

// The picture at its own size, with what is drawn over it as large, relatively, as on the screen.
export async function png(stage, item) {
  const [width, height] = item.size;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const [file, overlay] = [0, 1].map(() => document.createElement("canvas"));
  for (const canvas of [file, overlay]) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const unit = file.width / stage.element.getBoundingClientRect().width;
  draw(overlay.getContext("2d"), stage.view(scale, unit));
  const context = file.getContext("2d");
  context.drawImage(await whole(item), 0, 0, file.width, file.height);
  context.drawImage(overlay, 0, 0);
  return new Promise((resolve) => {
    file.toBlob(resolve, "image/png");
  });
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

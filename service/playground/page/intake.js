// How pictures come in: dropped, pasted, picked, photographed, or one of the samples.

import { address } from "./api.js";
import { fill, find, make } from "./elements.js";
import { Failure } from "./failures.js";
import { Picture } from "./pictures.js";

export function startIntake({ take, failed }) {
  const takeFiles = (files) => {
    const pictures = [...files].map((file) => new Picture(file, file.name || "pasted.png"));
    if (pictures.length) take(pictures);
  };
  for (const [button, input] of [["pick", "pick-input"], ["photograph", "photograph-input"]]) {
    find(button).addEventListener("click", () => find(input).click());
    find(input).addEventListener("change", (event) => {
      takeFiles(event.target.files);
      event.target.value = ""; // so that the same file can be picked again
    });
  }
  document.addEventListener("paste", (event) => {
    if (event.target.closest?.("input, textarea, dialog")) return;
    takeFiles(event.clipboardData?.files ?? []);
  });
  startDropping(takeFiles);
  return {
    listSamples: (samples) => listSamples(samples, { take, failed }),
  };
}

// Anywhere on the page: people aim at pages, not at boxes.
function startDropping(takeFiles) {
  let depth = 0; // a drag enters and leaves every element on its way
  const mark = () => document.body.classList.toggle("is-dropping", depth > 0);
  document.addEventListener("dragenter", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth += 1;
    mark();
  });
  document.addEventListener("dragleave", (event) => {
    if (!carriesFiles(event)) return;
    depth = Math.max(0, depth - 1);
    mark();
  });
  document.addEventListener("dragover", (event) => {
    if (carriesFiles(event)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    depth = 0;
    mark();
    takeFiles(event.dataTransfer.files);
  });
}

function carriesFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}

function listSamples(samples, { take, failed }) {
  fill(find("samples"), ...samples.map((sample) => {
    const image = make("img", { src: address(sample.path), alt: "", class: "sample-image", loading: "lazy" });
    const button = make("button", {
      type: "button", class: "sample", "data-sample": nameOf(sample),
      onclick: () => fetchSample(sample).then((picture) => take([picture]), failed),
    }, image, make("span", { text: sample.name }));
    return make("li", {}, button);
  }));
}

export function nameOf(sample) {
  return sample.path.split("/").at(-1).replace(/\.\w+$/, "");
}

export async function fetchSample(sample) {
  let response;
  try {
    response = await fetch(address(sample.path));
  } catch {
    throw Failure.unreachable();
  }
  if (!response.ok) throw await Failure.of(response);
  const blob = await response.blob();
  return new Picture(blob, sample.path.split("/").at(-1), sample);
}

// Objects that a detector found. Their masks are made when they are first drawn: most are never.

import { Mask } from "./masks.js";
import { channels, objectColour } from "./palette.js";

export class Found {
  #rle;
  #mask;
  #paint;

  constructor({ label, score, box, mask }, index) {
    this.label = label;
    this.score = score;
    this.box = box;
    this.index = index;
    this.colour = objectColour(index);
    this.#rle = mask?.rle ?? null;
  }

  // Null where the model has no masks.
  get mask() {
    this.#mask ??= this.#rle && new Mask(this.#rle);
    return this.#mask;
  }

  // The mask in the colour of the object; null where nothing of it can be seen.
  get paint() {
    if (!this.mask?.width) return null;
    this.#paint ??= this.mask.paint([...channels(this.colour), 255]);
    return this.#paint;
  }
}

// The class of every pixel, from the run lengths of each class.

import { runLengths } from "./masks.js";

const NONE = 255; // more classes than that are in no picture
const LONGEST = 2048; // pixels of what is painted
const DIM = 0.25; // of the other classes, while one is lit

export class Labels {
  #map = null;
  #painted = null;
  #lit = null;

  constructor({ segments, image }) {
    this.segments = segments;
    this.width = image.width;
    this.height = image.height;
  }

  // The index among the segments of each pixel, along the rows. Made when it is first needed.
  get map() {
    if (this.#map) return this.#map;
    const { width, height } = this;
    const map = new Uint8Array(width * height).fill(NONE);
    this.segments.forEach(({ mask }, index) => {
      let place = 0; // down the columns
      runLengths(mask.rle.counts).forEach((run, turn) => {
        const end = place + run;
        if (turn % 2 === 0) {
          place = end;
          return;
        }
        for (; place < end; place += 1) {
          map[(place % height) * width + Math.floor(place / height)] = index;
        }
      });
    });
    this.#map = map;
    return map;
  }

  // The index of the segment at a place of the picture; null where there is none.
  at([x, y]) {
    const [column, row] = [Math.floor(x), Math.floor(y)];
    if (column < 0 || row < 0 || column >= this.width || row >= this.height) return null;
    const index = this.map[row * this.width + column];
    return index === NONE ? null : index;
  }

  // All classes in their colours; those that are not lit are faint, if one is.
  paint(lit) {
    if (this.#painted && this.#lit === lit) return this.#painted;
    const { map, segments } = this;
    const scale = Math.min(1, LONGEST / Math.max(this.width, this.height));
    const [width, height] = [this.width, this.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = this.#painted ?? document.createElement("canvas");
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    const words = new Uint32Array(pixels.data.buffer);
    const colours = new Uint32Array(NONE + 1);
    segments.forEach(({ colour }, index) => {
      const opacity = lit === null || lit === index ? 255 : Math.round(255 * DIM);
      new Uint8Array(colours.buffer, 4 * index, 4).set([...colour, opacity]);
    });
    for (let row = 0; row < height; row += 1) {
      const from = Math.floor(((row + 0.5) * this.height) / height) * this.width;
      for (let column = 0; column < width; column += 1) {
        words[row * width + column] = colours[map[from + Math.floor(((column + 0.5) * this.width) / width)]];
      }
    }
    context.putImageData(pixels, 0, 0);
    this.#painted = canvas;
    this.#lit = lit;
    return canvas;
  }
}

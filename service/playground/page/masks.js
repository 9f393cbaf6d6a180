// Masks of objects, from COCO's compressed run lengths.

// The runs of a text: zeros and ones in turn, zeros first, down the columns.
export function runLengths(text) {
  const runs = [];
  let at = 0;
  while (at < text.length) {
    let value = 0;
    let shift = 0;
    let bits;
    do {
      bits = text.charCodeAt(at) - 48;
      value |= (bits & 0x1f) << shift;
      shift += 5;
      at += 1;
    } while (bits & 0x20);
    if (bits & 0x10 && shift < 32) value |= -1 << shift;
    // From the fourth on a run is told as the difference to the one before the last.
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

export class Mask {
  constructor({ size: [height, width], counts }) {
    const spans = ones(runLengths(counts));
    const rows = spans.flatMap(([start, end]) => {
      const last = end - 1;
      // A run that goes on in the next column has touched both edges.
      return Math.floor(start / height) === Math.floor(last / height)
        ? [start % height, last % height]
        : [0, height - 1];
    });
    const columns = spans.flatMap(([start, end]) => [
      Math.floor(start / height),
      Math.floor((end - 1) / height),
    ]);
    this.left = least(columns);
    this.top = least(rows);
    this.width = spans.length ? most(columns) - this.left + 1 : 0;
    this.height = spans.length ? most(rows) - this.top + 1 : 0;
    this.size = [width, height];
    this.bits = new Uint8Array(this.width * this.height);
    for (const [start, end] of spans) {
      for (let place = start; place < end; place += 1) {
        const x = Math.floor(place / height) - this.left;
        const y = (place % height) - this.top;
        this.bits[y * this.width + x] = 1;
      }
    }
  }

  has(x, y) {
    const column = x - this.left;
    const row = y - this.top;
    const inside = column >= 0 && row >= 0 && column < this.width && row < this.height;
    return inside && this.bits[row * this.width + column] === 1;
  }

  // The part of the picture that the mask covers, in one colour.
  paint(colour) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(this.width, 1);
    canvas.height = Math.max(this.height, 1);
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(canvas.width, canvas.height);
    this.bits.forEach((bit, place) => {
      if (bit) pixels.data.set(colour, place * 4);
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }
}

function ones(runs) {
  const spans = [];
  let place = 0;
  runs.forEach((run, index) => {
    if (index % 2 && run) spans.push([place, place + run]);
    place += run;
  });
  return spans;
}

function least(values) {
  return values.reduce((a, b) => Math.min(a, b), Infinity);
}

function most(values) {
  return values.reduce((a, b) => Math.max(a, b), -Infinity);
}

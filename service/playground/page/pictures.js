// A picture: its file, how the browser shows it, and what was answered.

import { Failure } from "./failures.js";

const LONGEST = 2048; // pixels of what is shown on the screen
let count = 0;

export class Picture {
  constructor(file, name, sample = null) {
    count += 1;
    this.id = count;
    this.file = file;
    this.name = name;
    this.sample = sample;
    this.url = URL.createObjectURL(file);
    this.state = "waiting"; // asking, done or failed
    this.failure = null;
    this.answers = new Map(); // by model
    this.size = null; // [width, height], pixels, after its orientation
    this.shown = null; // a canvas of at most LONGEST pixels a side
  }

  // Read the picture as the browser does; it may fail on what the server reads, and the other way.
  async open() {
    const image = new Image();
    image.src = this.url;
    try {
      await image.decode();
    } catch {
      return;
    }
    this.show(image, image.naturalWidth, image.naturalHeight);
  }

  show(source, width, height) {
    this.size = [width, height];
    const scale = Math.min(1, LONGEST / Math.max(width, height));
    this.shown ??= document.createElement("canvas");
    this.shown.width = Math.max(1, Math.round(width * scale));
    this.shown.height = Math.max(1, Math.round(height * scale));
    this.shown.getContext("2d").drawImage(source, 0, 0, this.shown.width, this.shown.height);
  }

  // Why the server would refuse the picture, known before anything is sent.
  refusal({ limits }) {
    if (this.file.size > limits.image_bytes) {
      const most = megabytes(limits.image_bytes);
      return new Failure(
        "too_large_to_send",
        `${this.name} has ${megabytes(this.file.size)}, and this server takes pictures of at most ${most}. Nothing was sent`,
      );
    }
    if (this.size && this.size[0] * this.size[1] > limits.pixels) {
      const [width, height] = this.size;
      return new Failure(
        "too_large_to_send",
        `${this.name} has ${width} x ${height} pixels, and this server takes pictures of at most ${millions(limits.pixels)} pixels. Nothing was sent`,
      );
    }
    return null;
  }

  close() {
    URL.revokeObjectURL(this.url);
  }
}

function megabytes(bytes) {
  if (bytes < 1e6) return `${Math.ceil(bytes / 1e3)} KB`;
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function millions(pixels) {
  return `${+(pixels / 1e6).toFixed(1)} million`;
}

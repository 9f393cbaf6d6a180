// The camera: one frame is sent when the answer to the one before is there; what comes meanwhile is
// dropped, so that nothing piles up.

import { askAbout } from "./asking.js";
import { find, show } from "./elements.js";
import { Failure } from "./failures.js";
import { Picture } from "./pictures.js";
import { second } from "./sides.js";
import { store } from "./store.js";
import { milliseconds } from "./timing.js";

const QUALITY = 0.85;
const AVERAGED = 12; // frames
const HIDDEN_MS = 400;
const REFUSALS = {
  NotAllowedError: "the browser does not let this page use the camera. Allow it beside the address, then try again",
  NotFoundError: "this device has no camera",
  NotReadableError: "another program is using the camera",
};
const INSECURE =
  "browsers give the camera only to pages over HTTPS, and to pages from the machine itself. " +
  "Serve over TLS, or open this page as localhost";

export class Camera {
  // `failed` is told why the camera ended, `waiting` as in patience.js.
  constructor({ failed, waiting }) {
    this.failed = failed;
    this.waiting = waiting;
    this.stopping = null;
    this.video = find("video");
    find("camera").addEventListener("click", () => (this.on ? this.stop() : this.start()));
  }

  get on() {
    return this.stopping !== null;
  }

  async start() {
    this.failed(null);
    const stopping = new AbortController();
    this.stopping = stopping;
    this.mark();
    try {
      const stream = await open();
      if (stopping.signal.aborted) {
        end(stream);
        return;
      }
      this.stream = stream;
      this.video.srcObject = stream;
      await this.video.play();
      await this.run(stopping.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.failed(error);
    } finally {
      if (this.stopping === stopping) this.stop();
    }
  }

  stop() {
    this.stopping?.abort();
    this.stopping = null;
    if (this.stream) end(this.stream);
    this.stream = null;
    this.video.srcObject = null;
    this.mark();
  }

  mark() {
    find("camera").setAttribute("aria-pressed", String(this.on));
    find("camera-label").textContent = this.on ? "Stop the camera" : "Live camera";
    show(find("camera-said"), this.on);
    if (!this.on) find("camera-said").textContent = "";
  }

  async run(signal) {
    const frame = document.createElement("canvas");
    const times = [];
    let item = null;
    let sent = 0;
    while (!signal.aborted) {
      if (document.hidden) {
        await new Promise((resolve) => setTimeout(resolve, HIDDEN_MS));
        continue;
      }
      const begun = performance.now();
      frame.width = this.video.videoWidth;
      frame.height = this.video.videoHeight;
      frame.getContext("2d").drawImage(this.video, 0, 0);
      const file = await new Promise((resolve) => frame.toBlob(resolve, "image/jpeg", QUALITY));
      const picture = new Picture(file, "frame.jpg");
      picture.size = [frame.width, frame.height];
      sent += 1;
      const { model, beside, query, layer } = store.now;
      const asked = [[model, layer], ...(beside ? [[beside, second.layer]] : [])];
      await Promise.all(asked.map(([of, shown]) =>
        askAbout(picture, of, { query: item && query, layer: shown, signal, waiting: this.waiting })));
      if (signal.aborted) return;
      picture.shown = item?.shown ?? null; // the canvas is used again
      picture.show(frame, frame.width, frame.height);
      picture.state = "done";
      // What was chosen before was of another picture.
      const anew = item ? {} : { query: null, lit: null };
      item?.close();
      item = picture;
      store.change({ chosen: item, layer: layerOf(item, model, layer), ...anew });
      times.push([begun, performance.now()]);
      this.tell(times.slice(-AVERAGED), sent);
    }
  }

  tell(times, sent) {
    const [first, last] = [times[0][0], times.at(-1)[1]];
    const rate = (times.length * 1000) / (last - first);
    const latency = times.reduce((sum, [begun, ended]) => sum + ended - begun, 0) / times.length;
    const seen = this.video.getVideoPlaybackQuality?.().totalVideoFrames ?? sent;
    const said = find("camera-said");
    said.textContent =
      `${rate.toFixed(1)} frames a second, ${milliseconds(latency)} each; ` +
      `${Math.max(0, seen - sent)} older frames dropped`;
    said.dataset.frames = String(sent);
  }
}

function layerOf(item, model, layer) {
  const known = item.answers.get(model.name);
  return known.grids.has(layer) ? layer : ([...known.grids.keys()].at(-1) ?? null);
}

async function open() {
  if (!navigator.mediaDevices?.getUserMedia) throw new Failure("no_camera", INSECURE);
  try {
    return await navigator.mediaDevices.getUserMedia({
      video: { facingMode: "environment", width: { ideal: 640 } },
      audio: false,
    });
  } catch (error) {
    throw new Failure("no_camera", REFUSALS[error.name] ?? `the camera cannot be used: ${error.message}`);
  }
}

function end(stream) {
  for (const track of stream.getTracks()) track.stop();
}

// A call of the interface: what is asked of which model. `copies.js` shows it as others would write it.

const SENT_AS_THEY_ARE = new Set(["image/jpeg", "image/png", "image/webp"]);

const OF_TASK = {
  classify: { top_k: 5 },
  detect: { score_threshold: 0.05 },
  segment: { format: "rle" },
};

// The cells of a window are told whole, or as many as the server tells at most.
const KEYS = 8;
const KEYS_IN_WINDOW = 32;

// Whether a model attends to windows, and has no points.
export function hasWindows({ variant }) {
  return variant.startsWith("swin");
}

// The tasks whose answers this page can show.
export function knows(task) {
  return task in OF_TASK;
}

// `queries` are [x, y] in pixels of the picture; null leaves the choice to the server.
export function makeCall(model, item, { explain = "attention", queries = null, layer = null } = {}) {
  const options = { model: model.name, ...OF_TASK[model.task], explain };
  if (explain === "attention") {
    if (queries) options.queries = queries.map(([x, y]) => [rounded(x), rounded(y)]);
    if (layer) options.layers = [layer];
    options.top_n = hasWindows(model) ? KEYS_IN_WINDOW : KEYS;
  }
  return {
    task: model.task,
    options,
    fileName: item.name,
    mediaType: SENT_AS_THEY_ARE.has(item.file.type) ? item.file.type : "application/octet-stream",
    path: `v1/${model.task}?${query(options)}`,
  };
}

function rounded(number) {
  return Math.round(number * 100) / 100;
}

function query(options) {
  return Object.entries(options)
    .map(([name, value]) => `${name}=${encodeURIComponent(written(value)).replace(/%2C/g, ",").replace(/%3B/g, ";")}`)
    .join("&");
}

// Positions as `x,y;x,y`, other lists as `a,b`.
function written(value) {
  if (!Array.isArray(value)) return String(value);
  return Array.isArray(value[0]) ? value.map((pair) => pair.join(",")).join(";") : value.join(",");
}

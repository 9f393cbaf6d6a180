// What went wrong, as a sentence for people.

const SENTENCES = {
  overloaded: "The server is busy: more is asked of it than it can answer in time.",
  rate_limited: "Your key has asked for as many pictures as it may for now.",
  too_many_connections: "The server has no connection left for this page.",
  not_ready: "The server is still reading its models.",
  draining: "This server is shutting down and takes no more pictures.",
  engine_unavailable: "Nothing can run this model at the moment.",
  worker_lost: "The process that computed this picture ended. Another one is being started.",
  unreachable: "The server cannot be reached.",
  deadline_exceeded: "The answer would have come too late. Try again, or choose a smaller picture.",
  unauthenticated: "This server needs an API key.",
  certificate_required: "This server needs a client certificate, and the browser showed none.",
  out_of_memory: "This picture needs more memory than the device has. Choose a smaller one.",
  engine_failed: "The server failed on this picture. Its log says why.",
  stopped: "You stopped this picture.",
  internal: "The server failed on this picture. Its log says why.",
};
const PASSING = new Set([
  "overloaded", "rate_limited", "too_many_connections", "not_ready", "draining",
  "engine_unavailable", "worker_lost", "unreachable",
]);

// The same request would fail again.
const FINAL = new Set([
  "invalid_image", "image_too_large", "too_large_to_send", "invalid_option", "out_of_memory",
]);

export class Failure extends Error {
  // `retryAfter` in seconds.
  constructor(code, message = "", { retryAfter = 2, requestId = "" } = {}) {
    super(SENTENCES[code] ?? sentence(code === "invalid_image" ? `this file cannot be used: ${message}` : message));
    this.code = code;
    this.said = message;
    this.retryAfter = retryAfter;
    this.requestId = requestId;
  }

  // Whether the same request may succeed later.
  get passes() {
    return PASSING.has(this.code);
  }

  // Whether it is worth to ask again.
  get mayPass() {
    return !FINAL.has(this.code);
  }

  static unreachable() {
    return new Failure("unreachable");
  }

  static async of(response) {
    const retryAfter = Number(response.headers.get("retry-after")) || 2;
    const body = await response.json().catch(() => null);
    const error = body?.error;
    if (!error) {
      return new Failure("unknown", `the server answered ${response.status}`, { retryAfter });
    }
    return new Failure(error.code, error.message, { retryAfter, requestId: error.request_id });
  }
}

export function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

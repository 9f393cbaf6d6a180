// Tries again when the server says that later may be better, and counts the seconds until then; or when
// it wants a key and somebody gave one.

import { askForKey } from "./keys.js";

const SECOND_MS = 1000;

// `waiting` is told a failure and the seconds that are left; null when the wait is over.
export async function patiently(work, { signal, waiting }) {
  for (;;) {
    try {
      return await work();
    } catch (failure) {
      if (failure.code === "unauthenticated") await askForKey(failure);
      else if (failure.passes) await countDown(failure, { signal, waiting });
      else throw failure;
    }
  }
}

async function countDown(failure, { signal, waiting }) {
  try {
    for (let left = Math.ceil(failure.retryAfter); left > 0; left -= 1) {
      waiting(failure, left);
      await pause(SECOND_MS, signal);
    }
  } finally {
    waiting(null, 0);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}

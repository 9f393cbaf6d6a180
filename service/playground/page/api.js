// Talks to the server that this page came from.

import { Failure } from "./failures.js";

const KEY = "dat-serve-key";

// The API key, for as long as this tab is open.
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

export function address(path) {
  return new URL(path, document.baseURI).href;
}

// Raises a `Failure` unless the server answers with success.
async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Failure.unreachable();
  }
  if (!response.ok) throw await Failure.of(response);
  return response;
}

// What this page has to know of the server; needs no key.
export async function facts() {
  return (await request("playground/server.json")).json();
}

export async function models() {
  return (await (await request("v1/models")).json()).models;
}

// Sends a picture. The answer has the one result, and where the time went, in milliseconds.
export async function ask(call, file, signal) {
  const begun = performance.now();
  const response = await request(call.path, {
    method: "POST",
    body: file,
    headers: { "Content-Type": call.mediaType },
    signal,
  });
  const text = await response.text();
  const received = performance.now();
  const body = JSON.parse(text);
  return {
    call,
    body,
    model: body.model,
    version: body.version,
    result: body.results[0],
    timing: {
      stages: serverTiming(response.headers.get("server-timing") ?? ""),
      total: received - begun,
      read: performance.now() - received,
    },
  };
}

// `decode;dur=4.83, batch;desc="2"` as {decode: 4.83, batch: 2}.
export function serverTiming(header) {
  const stages = {};
  for (const part of header.split(",")) {
    const [name, ...parameters] = part.trim().split(";");
    for (const parameter of parameters) {
      const [, value] = /(?:dur|desc)="?([\d.]+)"?/.exec(parameter) ?? [];
      if (value !== undefined) stages[name] = Number(value);
    }
  }
  return stages;
}

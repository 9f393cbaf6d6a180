// What the page has to say: what it waits for, and what went wrong.

import { find, show } from "./elements.js";
import { sentence } from "./failures.js";

// While the server is busy. Told anew each second; read out once for each reason.
export function tellWaiting(failure, seconds) {
  show(find("waiting"), Boolean(failure));
  if (!failure) return;
  const said = find("waiting-said");
  if (said.textContent !== failure.message) said.textContent = failure.message;
  find("waiting-left").textContent = `Trying again in ${seconds} s.`;
}

export function tellFailure(failure, { again = null } = {}) {
  show(find("failure"), Boolean(failure));
  find("failure-said").textContent = failure?.message ?? "";
  const button = find("failure-again");
  show(button, Boolean(again));
  button.onclick = again;
}

export function tell(text) {
  find("said").textContent = text && sentence(text);
}

// Asks for the API key that a server may want; it stays in this tab.

import { key } from "./api.js";
import { find } from "./elements.js";

let asked = null;

// Resolves when there is a key to try; rejects with the failure when nobody gives one.
export function askForKey(failure) {
  asked ??= ask(failure).finally(() => {
    asked = null;
  });
  return asked;
}

function ask(failure) {
  const dialog = find("key-dialog");
  const input = find("key");
  find("key-wrong").hidden = !key.get();
  input.value = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    const listening = new AbortController();
    const end = (settle) => {
      listening.abort();
      if (dialog.open) dialog.close();
      settle();
    };
    const { signal } = listening;
    find("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!input.value.trim()) return;
      key.set(input.value.trim());
      end(resolve);
    }, { signal });
    find("key-cancel").addEventListener("click", () => end(() => reject(failure)), { signal });
    dialog.addEventListener("cancel", () => end(() => reject(failure)), { signal });
  });
}

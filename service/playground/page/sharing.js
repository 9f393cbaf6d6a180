// The panel from which a call, an answer or the state is taken along.

import { COPIES } from "./copies.js";
import { fill, find, make, show } from "./elements.js";
import { writeLink } from "./link.js";
import { tell } from "./notices.js";
import { shownExchanges } from "./sides.js";
import { store } from "./store.js";

let form = "curl";

export function startSharing() {
  fill(find("copy-forms"), ...Object.keys(COPIES).map((name) => {
    const input = make("input", {
      type: "radio", name: "copy-form", value: name, class: "chip-input",
      onchange: () => {
        form = name;
        update(store.now);
      },
    });
    input.checked = name === form;
    return make("label", { class: "chip" }, input, make("span", { text: name }));
  }));
  find("copy").addEventListener("click", () => copy(find("call").textContent, `The ${form} call is copied`));
  find("copy-link").addEventListener("click", () => {
    writeLink();
    const own = store.now.chosen?.sample ? "" : " It does not hold your picture";
    copy(location.href, `The link is copied.${own}`);
  });
  store.listen(update);
}

function update(now) {
  const exchanges = shownExchanges();
  show(find("sharing-panel"), exchanges.length > 0);
  const text = exchanges.map(({ call }) => COPIES[form](call, now.facts)).join("\n\n");
  const place = find("call");
  if (place.textContent !== text) place.textContent = text;
}

async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text);
    tell(said);
  } catch {
    // Browsers give the clipboard to pages over HTTPS and of this machine alone.
    tell("The browser does not let this page copy. Select the text and copy it yourself");
    getSelection().selectAllChildren(find("call"));
  }
}

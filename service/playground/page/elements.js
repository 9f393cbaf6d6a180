// Makes and finds elements of the page. Text is always set as text, never as HTML.

export function find(id) {
  return document.getElementById(id);
}

// An element with attributes and children; `class`, `text` and `on…` listeners among the attributes.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// A slot of the page has one thing at a time.
export function fill(element, ...children) {
  element.replaceChildren(...children.filter((child) => child !== null));
}

export function show(element, shown) {
  element.hidden = !shown;
}

export function prefersCalm() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

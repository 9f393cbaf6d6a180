// Shows the document of the interface in Swagger UI, with the key of this tab where the server wants one.

const KEY = "dat-serve-key"; // as the playground calls it
const form = document.getElementById("key-form");
const failure = document.getElementById("failure");

function keyed(headers) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

async function start() {
  const response = await fetch("openapi.json", { headers: keyed({}), cache: "no-store" });
  form.hidden = response.status !== 401;
  failure.hidden = response.ok || response.status === 401;
  if (response.ok) {
    show(await response.json());
  } else {
    failure.textContent = `The document of the interface cannot be had: the server answered ${response.status}.`;
  }
}

function show(spec) {
  window.SwaggerUIBundle({
    spec,
    dom_id: "#interface",
    deepLinking: true,
    validatorUrl: null, // it would be asked on another host
    requestInterceptor(request) {
      request.headers = keyed(request.headers ?? {});
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, document.getElementById("key").value.trim());
  start();
});
start();

// Talks to the server that this page came from, with a key where it asks for one.
"use strict";
const at = (id) => document.getElementById(id);
const stored = (name) => { try { return sessionStorage.getItem(name); } catch { return null; } };
let key = stored("key") || "", door = null;

// Makes an element with properties and children. Strings become text, never HTML.
function make(tag, properties = {}, ...children) {
  const { className, ...rest } = properties, element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(rest)) {
    if (typeof value === "function") element.addEventListener(name, value); else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Asks this server. patient: asks the visitor for a key where one is needed.
async function ask(path, { patient = true, ...options } = {}) {
  for (;;) {
    const sent = key, headers = { "Content-Type": "application/json", ...(sent && { Authorization: "Bearer " + sent }) };
    const reply = await fetch(path, { ...options, headers }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer.");
    });
    if (reply.ok) return reply;
    if (reply.status === 401 && patient) {
      if (sent === key) await (door ??= knock(sent).finally(() => { door = null; }));
      continue;
    }
    const body = await reply.json().catch(() => null);
    throw new Error(body?.error?.message || "The server answered " + reply.status + ".");
  }
}

// Opens the dialog for a key; rejects if there is none.
function knock(refused) {
  at("refused").textContent = refused ? "The last one was refused." : "";
  at("key").value = "";
  at("door").returnValue = "";
  at("door").showModal();
  return new Promise((resolve, reject) => at("door").addEventListener("close", () => {
    key = at("door").returnValue ? at("key").value.trim() : "";
    try { sessionStorage.setItem("key", key); } catch { /* it is asked for again, then */ }
    if (key) resolve(); else reject(new Error("This server asks for an API key, and none was given."));
  }, { once: true }));
}

// The messages of a stream of server-sent events. One that ends without [DONE] was cut.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer did.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const message = JSON.parse(part.slice("data: ".length));
      if (message.error) throw new Error(message.error.message);
      yield message;
    }
  }
}

// Copies a text. Pages without TLS have no clipboard of their own, but may copy what is selected.
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea", { className: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    button.focus();
    if (!copied) return;
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

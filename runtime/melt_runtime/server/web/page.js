// The page's controls.
function busy(is) {
  at("send").textContent = is ? "Stop" : "Send";
  document.body.classList.toggle("busy", is);
}

function show() {
  at("loops-shown").textContent = at("loops").value;
  const by = at("by").value, value = Number(at("exit").value), shown = by === "entropy" ? 1 - value : value;
  at("exit").disabled = by === "auto";
  at("exit-shown").textContent = by === "auto" ? "auto" : value < 1 ? shown.toFixed(2) : "never";
  at("temperature-shown").textContent = Number(at("temperature").value).toFixed(1);
}

// Moves the slider of the loops to what auto was calibrated with, and back to where it stood.
let loopsBefore = null;
function followAuto() {
  const auto = at("by").value === "auto";
  if (auto !== (loopsBefore === null)) return;
  const now = at("loops").value;
  at("loops").value = auto ? model.exit_loops : loopsBefore;
  loopsBefore = auto ? now : null;
  show();
  poll();
}

function legend() {
  const most = model.loops, shown = new Set([1, 2, 3, 4].map((i) => Math.round(1 + (most - 1) * (i - 1) / 3)));
  at("scale").replaceChildren(...(most > 1 ? ["loops ", ...[...shown].map((depth) => {
    const sample = make("b", {}, String(depth));
    tint(sample, depth);
    return sample;
  })] : []));
}

function listChats() {
  const kept = keptChats();
  at("chats").replaceChildren(...kept.map((one) => make("li", {},
    make("button", { type: "button", className: "open", click: () => openChat(one),
      ...(one.id === chat.id && { "aria-current": "true" }) }, one.title || "Untitled"),
    make("button", { type: "button", className: "small", "aria-label": "Delete chat: " + one.title,
      click: () => { dropChat(one.id); if (one.id === chat.id) leaveDeleted(); else listChats(); } }, "×"))));
  at("no-chats").hidden = kept.length > 0;
  at("delete-all").hidden = !kept.length;
}

function openChat(one) {
  running?.abort();
  chat = one;
  at("system").value = chat.system;
  draw();
  listChats();
  drawer(false);
  at("text").focus();
}

// Begins a new chat in place of one that was deleted, which an answer on its way must not bring back.
function leaveDeleted() {
  chat.deleted = true;
  newChat();
}

const newChat = () => openChat(freshChat(at("system").value.trim()));

// Shows what another tab kept or deleted, also of the chat that is open here, unless it is being answered or edited.
function follow() {
  const newer = keptChats().find((one) => one.id === chat.id && one.changed > chat.changed);
  if (newer && !running && !at("talk").querySelector("textarea")) {
    chat = { ...newer, system: chat.system };
    draw();
  }
  listChats();
}

// Opens or closes the panel of chats and settings, which a narrow page shows only when asked.
function drawer(open) {
  document.body.classList.toggle("drawn", open);
  at("menu").setAttribute("aria-expanded", open);
}

// Asks what is served; whether it was told.
async function begin() {
  try {
    model = (await (await ask("/v1/models")).json()).data[0];
    at("name").textContent = document.title = model.id;
    at("loops").max = at("loops").value = model.loops;
    at("depth").hidden = model.loops === 1;
    at("opening").hidden = !model.chat;
    const bound = model.exit_loops < model.loops ? `, ${loops(model.exit_loops)} at most` : "";
    if (model.exit && !at("by").querySelector("[value=auto]")) at("by").add(new Option(`auto: ${model.exit}${bound}`, "auto"));
    at("exit").value = model.exit_threshold;
    at("most").max = model.max_tokens;
    at("most").placeholder = model.chat ? model.max_tokens : Math.min(256, model.max_tokens);
    at("text").placeholder = model.example_prompt ? "For example: " + model.example_prompt
      : model.chat ? "Say something" : "Text to go on with";
    legend();
    explainMemory();
    show();
    poll();
    draw();
  } catch (error) {
    say("error", error.message);
  }
  return model !== null;
}

async function submit(event) {
  event.preventDefault();
  if (running) return running.abort();
  const text = at("text").value.trim();
  if (!text || !(model || await begin())) return;
  at("text").value = "";
  answer(text);
}

at("form").addEventListener("submit", submit);
at("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (running) event.preventDefault(); else submit(event); // the button stops an answer, Enter does not
});
at("new").addEventListener("click", newChat);
at("delete-all").addEventListener("click", () => {
  if (!confirm("Delete all chats that this browser keeps?")) return;
  writeChats([]);
  leaveDeleted();
});
at("system").addEventListener("input", () => { chat.system = at("system").value.trim(); });
at("menu").addEventListener("click", () => drawer(!document.body.classList.contains("drawn")));
at("shade").addEventListener("click", () => drawer(false));
addEventListener("keydown", (event) => { if (event.key === "Escape") drawer(false); });
addEventListener("storage", follow);
for (const id of ["loops", "by", "exit", "temperature"]) at(id).addEventListener("input", show);
at("loops").addEventListener("change", poll);
at("by").addEventListener("change", followAuto);
[chat = chat] = keptChats();
at("system").value = chat.system;
listChats();
show();
begin();

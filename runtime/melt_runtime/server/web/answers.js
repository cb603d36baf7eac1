// The conversation on the page: asks, shows what comes, and offers to copy, edit and ask again.
const SHORTEST = 0.05; // seconds; answers that arrive faster than this came too close together to tell a speed
let model = null, chat = freshChat(), running = null;

function say(kind, text) {
  at("talk").append(make("p", { className: kind, ...(kind === "error" && { role: "alert" }) }, text));
  at("talk").scrollTop = at("talk").scrollHeight;
}

// Colours an element by a depth: 0 is one loop, 1 the most that the slider allows.
function tint(element, depth) {
  const most = Number(at("loops").max);
  element.style.setProperty("--share", most > 1 ? Math.min(1, (depth - 1) / (most - 1)) : 0);
  element.title = loops(depth);
}

// Returns a function that adds text to an element, each piece in the colour of its loops.
function painter(turn) {
  if (!(model?.loops > 1)) return (parent, text) => { if (text) parent.append(text); };
  const owners = []; // by character: which piece it came with
  return (parent, text, places) => {
    for (let n = owners.length ? owners.at(-1) + 1 : 0; n < turn.pieces.length; n++) {
      for (let i = 0; i < turn.pieces[n][0]; i++) owners.push(n);
    }
    for (let i = 0, end; i < text.length; i = end) {
      const owner = owners[places[i]];
      for (end = i + 1; end < text.length && owners[places[end]] === owner; end++);
      const span = make("span", { className: "token" }, text.slice(i, end));
      tint(span, turn.pieces[owner]?.[1] ?? 1);
      parent.append(span);
    }
  };
}

// The two ways to show an answer: Markdown of a chat, and the bare text of a model that only goes on.
function view(element, turn) {
  const paint = painter(turn);
  if (model?.chat ?? true) return new Growing(element, paint);
  return { show(source) { element.replaceChildren(); paint(element, source, Array.from({ length: source.length }, (_, i) => i)); } };
}

const tool = (name, click) => {
  const button = make("button", { type: "button", className: "small", click: () => click(button) }, name);
  return button;
};

function userTurn(turn, place) {
  const line = make("p", { className: "user" }, turn.content);
  return make("div", { className: "turn asked" }, line, make("div", { className: "tools" },
    tool("Copy", (button) => copy(turn.content, button)), tool("Edit", () => edit(place))));
}

function thoughts(turn, options = {}) {
  return make("details", options, make("summary", {}, "Thinking"), make("p", {}, turn.thinking));
}

function assistantTurn(turn, place) {
  const line = make("div", { className: "assistant", "aria-busy": "false" });
  view(line, turn).show(turn.content);
  return make("div", { className: "turn" }, ...(turn.thinking ? [thoughts(turn)] : []), line,
    make("div", { className: "tools" }, make("p", { className: "note" }, turn.note),
      tool("Copy", (button) => copy(turn.content, button)),
      tool("Regenerate", () => { if (!running) answer(chat.turns[place - 1].content, place - 1); })));
}

// Shows the turns from one on; those before it stay as they are shown.
function draw(from = 0) {
  const talk = at("talk"), focused = talk.contains(document.activeElement) && document.activeElement !== talk;
  [...talk.children].slice(from).forEach((one) => one.remove());
  chat.turns.slice(from).forEach((turn, i) => talk.append((turn.role === "user" ? userTurn : assistantTurn)(turn, from + i)));
  if (!chat.turns.length && model) {
    say("note", (model.chat ? "" : "This model has no chat template: it goes on with what you write. ") +
      "Enter sends, Shift+Enter begins a new line." + (model.loops > 1 ? " Each token has the colour of the loops it took." : ""));
  }
  if (focused) at("text").focus();
  talk.scrollTop = talk.scrollHeight;
}

// Lets the visitor write a question anew; what came after it is answered anew too.
function edit(place) {
  if (running) return;
  const turn = at("talk").children[place], field = make("textarea", { rows: "3", "aria-label": "Edited question" });
  field.value = chat.turns[place].content;
  const done = () => { if (!running && field.value.trim()) answer(field.value.trim(), place); };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") draw(place);
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); done(); }
  });
  turn.className = "turn edited";
  turn.replaceChildren(field, make("div", { className: "tools" }, tool("Ask again", done), tool("Cancel", () => draw(place))));
  field.focus();
}

// What ends a token's loops: the end of the slider on the right is never, whatever is measured.
function leaving() {
  const by = at("by").value, value = Number(at("exit").value);
  return value === 1 ? "never" : by === "entropy" ? `entropy:${(1 - value).toFixed(2)}` : `margin:${Math.max(value, 0.01)}`;
}

// Returns the fields that decide how deep tokens go; none for a model that does not loop.
function depthFields() {
  if (model.loops === 1) return {};
  const exit = Number(at("exit").value), by = at("by").value;
  const leave = by === "auto" ? { exit: "auto" } : by === "gate"
    ? (exit < 1 || model.exit_threshold < 1 ? { exit_threshold: exit } : {}) : { exit: leaving() };
  return { loops: Number(at("loops").value), ...leave };
}

function request(turns) {
  const asked = Math.floor(Number(at("most").value)), most = Math.min(asked, model.max_tokens);
  const bound = asked >= 1 ? most : model.chat ? null : Math.min(256, model.max_tokens);
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (chat.system) messages.unshift({ role: "system", content: chat.system });
  return {
    model: model.id, stream: true, temperature: Number(at("temperature").value), ...depthFields(),
    ...(bound && { max_tokens: bound }), ...(model.chat ? { messages } : { prompt: turns.at(-1).content }),
  };
}

// Asks a question at a place of the chat, in place of what followed. A question that gets no word leaves the chat as it
// was.
async function answer(text, place = chat.turns.length) {
  const mine = chat, before = mine.turns, times = [];
  const turn = { role: "assistant", content: "", pieces: [], note: "", thinking: "" };
  mine.turns = [...before.slice(0, place), { role: "user", content: text }];
  const body = JSON.stringify(request(mine.turns));
  draw(place);
  const line = make("div", { className: "assistant", "aria-busy": "true" }), shown = view(line, turn);
  const whole = make("div", { className: "turn" }, line);
  at("talk").append(whole);
  at("talk").scrollTop = at("talk").scrollHeight;
  let spent = 0, end = "cut", failure = null, frame = 0;
  const show = () => {
    frame = 0;
    const near = at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 120;
    shown.show(turn.content);
    if (turn.thinking) {
      if (whole.firstChild === line) whole.prepend(thoughts(turn, { open: "" }));
      whole.querySelector("details p").textContent = turn.thinking;
    }
    if (near && mine === chat) at("talk").scrollTop = at("talk").scrollHeight;
  };
  const stopper = running = new AbortController(), polling = setInterval(poll, 2000);
  busy(true);
  try {
    const path = model.chat ? "/v1/chat/completions" : "/v1/completions";
    for await (const message of events(await ask(path, { method: "POST", body, signal: stopper.signal }))) {
      for (const choice of message.choices) {
        const piece = (model.chat ? choice.delta.content : choice.text) || "";
        turn.thinking += (model.chat && choice.delta.reasoning_content) || "";
        turn.content += piece;
        if (piece) turn.pieces.push([piece.length, choice.depth.at(-1) ?? 1]);
        for (const depth of choice.depth) { times.push(performance.now()); spent += depth; }
        end = { stop: "ended by itself", length: "as long as allowed" }[choice.finish_reason] || end;
      }
      frame ||= requestAnimationFrame(show);
    }
  } catch (error) {
    if (error.name === "AbortError") end = "stopped"; else failure = error;
  }
  cancelAnimationFrame(frame);
  clearInterval(polling);
  if (running === stopper) {
    running = null;
    busy(false);
  }
  const count = times.length, seconds = (times.at(-1) - times[0]) / 1000;
  if (count) {
    const rate = seconds >= SHORTEST ? `, ${((count - 1) / seconds).toFixed(count > seconds * 10 ? 0 : 1)} tokens/s` : "";
    const depth = model.loops > 1 ? `, ${(spent / count).toFixed(2)} loops each` : "";
    turn.note = `${count} ${count === 1 ? "token" : "tokens"}${depth}${rate}, ${end}`;
    mine.turns = [...mine.turns, turn];
    Object.assign(mine, { model: model.id, title: mine.title || text.slice(0, 80) });
  } else mine.turns = before;
  const lost = count && !mine.deleted ? keepChat(mine) : "";
  listChats();
  poll();
  if (mine !== chat) return;
  draw(count ? place + 1 : place);
  if (lost) say("note", lost);
  if (failure) say("error", failure.message);
  if (!count && !at("text").value && before[place]?.content !== text) at("text").value = text;
}

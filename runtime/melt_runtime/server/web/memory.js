// What the model's state takes: in words and bars from the package, and as the server measures it.
const readings = []; // [bytes of state, loops asked for]

const loops = (count) => count + (count === 1 ? " loop" : " loops");

function human(bytes) {
  const unit = bytes < 1e6 ? ["kB", 1e3] : bytes < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return (bytes / unit[1]).toFixed(1) + " " + unit[0];
}

// Says what one conversation takes at one loop, at all, and with a cache per loop.
function explainMemory() {
  const { state_bytes: state, one_loop_bytes: one, cache_per_loop_bytes: perLoop, shared } = model.memory, most = model.loops;
  const chat = `A conversation of ${model.max_seq_len.toLocaleString("en")} tokens, the most that fit, takes `;
  if (most === 1) at("memory-words").textContent = `${chat}${human(state)}. This model does not loop.`;
  else if (shared) at("memory-words").textContent = `${chat}${human(one)} of state at 1 loop per token and ` +
    `${human(state)} at ${most}: all loops share their caches. With a cache per loop it would take ${human(perLoop)}.`;
  else at("memory-words").textContent = `${chat}${human(perLoop)} of state, because this model keeps a cache per loop. ` +
    `With 1 loop it would take ${human(one)}.`;
  const bars = most === 1 ? [] : [["1 loop", one], [loops(most), shared ? state : perLoop]];
  if (shared && most > 1) bars.push(["a cache per loop", perLoop, "other"]);
  at("bars").replaceChildren(...bars.flatMap(([name, bytes, kind]) => {
    const bar = make("span", { className: "bar " + (kind || "") });
    bar.style.setProperty("--share", bytes / perLoop);
    return [make("dt", {}, name), make("dd", {}, bar, make("span", {}, human(bytes)))];
  }));
}

// Reads the server's state: its bytes stay where they are, however many loops a token takes.
async function measure() {
  const now = Number(at("loops").value); // by the time of the reply it may have moved on
  const state = await (await ask("/v1/state", { patient: false })).json();
  readings.push([state.state_bytes, now]);
  readings.splice(0, readings.length - 60);
  const bytes = readings.map(([one]) => one), asked = readings.map(([, one]) => one);
  const [least, most] = [Math.min(...asked), Math.max(...asked)];
  const moved = Math.max(...bytes) - Math.min(...bytes);
  at("bytes").textContent = `${human(state.state_bytes)} for ${state.slots} ${state.slots === 1 ? "slot" : "slots"}`;
  at("moved").textContent = `moved by ${moved} bytes at ${least === most ? loops(most) : `${least} to ${loops(most)}`}`;
}

function poll() {
  if (model && !document.hidden) measure().catch((error) => { at("moved").textContent = error.message; });
}

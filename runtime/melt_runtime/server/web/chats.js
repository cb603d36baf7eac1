// The chats that this browser keeps, in its localStorage: no server has them.
// A chat is { id, model, title, system, changed, turns }. A turn is { role, content }, of an answer also { pieces, note,
// thinking }; pieces are [characters, loops] in order.
const PLACE = "melt-chats", MOST_CHATS = 50, MOST_CHARACTERS = 2_000_000;

const freshChat = (system = "") => ({
  id: Date.now().toString(36) + Math.random().toString(36).slice(2), model: "", title: "", system, changed: 0, turns: [],
});

const isText = (value) => typeof value === "string";
const isPiece = (piece) => Array.isArray(piece) && Number.isInteger(piece[0]) && piece[0] >= 0 && Number.isFinite(piece[1]);
const areOf = (pieces, text) => Array.isArray(pieces) && pieces.every(isPiece) &&
  pieces.reduce((sum, [characters]) => sum + characters, 0) <= text.length;
const isTurn = (turn, place) => turn && isText(turn.content) && (place % 2 ? turn.role === "assistant" &&
  isText(turn.note) && isText(turn.thinking) && areOf(turn.pieces, turn.content) : turn.role === "user");
const isChat = (chat) => chat && isText(chat.id) && isText(chat.model) && isText(chat.title) && isText(chat.system) &&
  Number.isFinite(chat.changed) && Array.isArray(chat.turns) && chat.turns.every(isTurn);

// Returns the kept chats, the newest first.
function keptChats() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE) || "[]");
    return Array.isArray(found) ? found.filter(isChat).sort((a, b) => b.changed - a.changed) : [];
  } catch {
    return [];
  }
}

// Keeps these chats, without the oldest ones where they are too many. Returns how many were dropped; Infinity: the
// browser keeps nothing.
function writeChats(chats) {
  const fitting = chats.slice(0, MOST_CHATS);
  for (; fitting.length || !chats.length; fitting.pop()) {
    const written = JSON.stringify(fitting);
    if (written.length > MOST_CHARACTERS) continue;
    try {
      localStorage.setItem(PLACE, written);
      return chats.length - fitting.length;
    } catch {
      if (!fitting.length) break;
    }
  }
  return Infinity;
}

// Keeps a chat beside those that other tabs keep; where one of them has gone on with this chat, beside that too. Returns
// a sentence where something is lost, or "".
function keepChat(chat) {
  const kept = keptChats();
  if (kept.some((one) => one.id === chat.id && one.changed !== chat.changed)) chat.id = freshChat().id;
  chat.changed = Date.now();
  const dropped = writeChats([chat, ...kept.filter((one) => one.id !== chat.id)]);
  if (dropped === Infinity) return "This browser does not keep this chat: it is gone when the page is closed.";
  return dropped ? "The browser has no room for more chats: the oldest was deleted." : "";
}

const dropChat = (id) => writeChats(keptChats().filter((one) => one.id !== id));

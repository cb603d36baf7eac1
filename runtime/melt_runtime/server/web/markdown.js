// Shows Markdown as elements. Text only ever becomes text nodes, tags and attributes come from this file alone, and
// nothing is loaded: images are links. A piece of text keeps its place in the source, so that it can be coloured.
const NESTED = 8; // how deep quotes, lists and emphasis may lie in each other; deeper marks stay text
const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)])(?: +|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*?)(?: +#+ *)?$/;
const DELIMITERS = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/;

// Lines as { text, from }: from is where the text begins in the source.
function linesOf(source, start) {
  let from = start;
  return source.slice(start).split("\n").map((text) => {
    const line = { text, from };
    from += text.length + 1;
    return line;
  });
}

const cut = (line, count) => ({ text: line.text.slice(count), from: line.from + Math.min(count, line.text.length) });
const blank = (line) => !line.text.trim();
const indent = (line) => line.text.length - line.text.trimStart().length;
const begins = (line) => FENCE.test(line.text) || HEADING.test(line.text) || RULE.test(line.text) ||
  ITEM.test(line.text) || /^ {0,3}>/.test(line.text);

// Yields a block's element and the line behind it. paint(parent, text, places) adds text whose characters lie at these
// places of the source.
function* blocks(lines, paint, depth = 0) {
  for (let i = 0; i < lines.length;) {
    const line = lines[i], first = i;
    let match, element;
    if (blank(line)) { i++; continue; }
    if ((match = FENCE.exec(line.text))) {
      const [mark, close] = [match[1], new RegExp(`^ {0,3}\\${match[1][0]}{${match[1].length},} *$`)];
      const code = [], shift = line.text.indexOf(mark);
      for (i++; i < lines.length && !close.test(lines[i].text); i++) code.push(cut(lines[i], Math.min(shift, indent(lines[i]))));
      i++;
      element = codeBlock(code, match[2], paint);
    } else if ((match = HEADING.exec(line.text))) {
      element = make("h" + Math.min(6, match[1].length + 1));
      inline(element, [{ text: match[2], from: line.from + line.text.indexOf(match[2], match[1].length) }], paint);
      i++;
    } else if (RULE.test(line.text)) {
      element = make("hr");
      i++;
    } else if (depth < NESTED && /^ {0,3}>/.test(line.text)) {
      const inner = [];
      for (; i < lines.length && (match = /^ {0,3}> ?/.exec(lines[i].text)); i++) inner.push(cut(lines[i], match[0].length));
      element = make("blockquote");
      for (const [child] of blocks(inner, paint, depth + 1)) element.append(child);
    } else if (depth < NESTED && (match = ITEM.exec(line.text))) {
      [element, i] = list(lines, i, match, paint, depth);
    } else if (line.text.includes("|") && lines[i + 1] && DELIMITERS.test(lines[i + 1].text) && lines[i + 1].text.includes("|")) {
      element = make("table", {}, row(line, "th", paint));
      for (i += 2; i < lines.length && lines[i].text.includes("|"); i++) element.append(row(lines[i], "td", paint));
      element = make("div", { className: "wide" }, element);
    } else {
      for (i++; i < lines.length && !blank(lines[i]) && !begins(lines[i]); i++);
      element = make("p");
      inline(element, lines.slice(first, i), paint);
    }
    yield [element, i, first];
  }
}

function codeBlock(code, language, paint) {
  const text = code.map((line) => line.text).join("\n"), inner = make("code");
  paint(inner, text, placesOf(code));
  const button = make("button", { type: "button", className: "small", click: () => copy(text, button) }, "Copy code");
  return make("div", { className: "code" }, make("div", {}, make("span", {}, language || "code"), button),
    make("pre", { tabindex: "0" }, inner));
}

function list(lines, start, found, paint, depth) {
  const element = make(found[2] ? "ol" : "ul", found[2] ? { start: found[2] } : {}), outer = found[1].length;
  let i = start, match;
  while (i < lines.length && (match = ITEM.exec(lines[i].text)) && !RULE.test(lines[i].text) &&
      Math.abs(match[1].length - outer) < 2 && !match[2] === !found[2]) {
    const inner = [cut(lines[i], match[0].length)], width = Math.min(match[0].length, outer + 4);
    for (i++; i < lines.length; i++) {
      const line = lines[i], next = lines[i + 1];
      if (blank(line)) {
        if (!next || blank(next) || (indent(next) < outer + 2 && !ITEM.test(next.text))) break;
      } else if (indent(line) < outer + 2 && (begins(line) || blank(lines[i - 1]))) break;
      inner.push(cut(line, Math.min(indent(line), width)));
    }
    const item = make("li");
    for (const [child] of blocks(inner, paint, depth + 1)) item.append(child);
    element.append(item);
  }
  return [element, i];
}

function row(line, tag, paint) {
  const element = make("tr"), edge = /^ *\|/.exec(line.text)?.[0].length ?? 0;
  let from = edge;
  const end = /\| *$/.test(line.text) && line.text.trim().length > 1 ? line.text.lastIndexOf("|") : line.text.length;
  for (let i = edge; i <= end; i++) {
    if (i < end && (line.text[i] !== "|" || line.text[i - 1] === "\\")) continue;
    const text = line.text.slice(from, i), cell = make(tag);
    inline(cell, [{ text: text.trim(), from: line.from + from + text.length - text.trimStart().length }], paint);
    element.append(cell);
    from = i + 1;
  }
  return element;
}

// The places in the source of the characters of lines joined by line breaks.
function placesOf(lines) {
  const places = [];
  lines.forEach((line, n) => {
    if (n) places.push(line.from - 1);
    for (let i = 0; i < line.text.length; i++) places.push(line.from + i);
  });
  return places;
}

const SPANS = [
  ["***", "strong"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"],
];
const LINK = /!?\[([^[\]\n]*)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?: +"[^"\n]*")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`)\]]*[^\s<>"'`)\].,;:!?*_~]/y;
const word = (character) => /[\p{L}\p{N}]/u.test(character || "");

// Adds what lines say, with code, emphasis and links.
function inline(parent, lines, paint) {
  spans(parent, lines.map((line) => line.text).join("\n"), placesOf(lines), paint, 0);
}

function spans(parent, text, places, paint, depth) {
  let from = 0, i = 0;
  const missing = new Set(); // marks that are not closed behind here, so that none is sought twice
  const flush = (to) => { if (to > from) paint(parent, text.slice(from, to), places.slice(from, to)); };
  const inside = (element, begin, end, next) => {
    flush(i);
    parent.append(element);
    spans(element, text.slice(begin, end), places.slice(begin, end), paint, depth + 1);
    from = i = next;
  };
  while (i < text.length) {
    const one = text[i];
    if (one === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] || "")) {
      flush(i);
      from = i + 1;
      i += 2;
    } else if (one === "`") {
      const mark = /^`+/.exec(text.slice(i, i + 64))[0], end = missing.has(mark) ? -1 : closing(text, mark, i + mark.length);
      if (end < 0) { missing.add(mark); i += mark.length; continue; }
      flush(i);
      const code = make("code");
      paint(code, text.slice(i + mark.length, end), places.slice(i + mark.length, end));
      parent.append(code);
      from = i = end + mark.length;
    } else if ((one === "[" || one === "!") && depth < NESTED && matches(LINK, text, i)) {
      const [whole, label, to] = matches(LINK, text, i), begin = i + whole.indexOf("[") + 1;
      const href = address(to);
      if (!href) { i += whole.length; continue; }
      if (label) inside(link(href), begin, begin + label.length, i + whole.length);
      else { flush(i); parent.append(link(href, href)); from = i += whole.length; }
    } else if (one === "h" && depth < NESTED && !word(text[i - 1]) && matches(ADDRESS, text, i)) {
      const [found] = matches(ADDRESS, text, i), href = parent.closest("a") ? null : address(found);
      if (!href) { i += found.length; continue; }
      flush(i);
      const element = link(href);
      paint(element, found, places.slice(i, i + found.length));
      parent.append(element);
      from = i = i + found.length;
    } else if ("*_~".includes(one) && depth < NESTED) {
      const span = SPANS.find(([mark]) => text.startsWith(mark, i));
      const end = span ? emphasis(text, span[0], i, missing) : -1;
      if (end < 0) { while (text[i] === one) i++; continue; }
      const element = make(span[1]), size = span[0].length;
      inside(element, i + size, end, end + size);
    } else i++;
  }
  flush(i);
}

function matches(pattern, text, start) {
  pattern.lastIndex = start;
  return pattern.exec(text);
}

// Where a run of exactly these backticks begins, or -1.
function closing(text, mark, start) {
  for (let i = text.indexOf(mark, start); i >= 0; i = text.indexOf(mark, i)) {
    let end = i;
    while (text[end] === "`") end++;
    if (end - i === mark.length) return i;
    i = end;
  }
  return -1;
}

// Where an emphasis that opens here is closed, or -1.
function emphasis(text, mark, start, missing) {
  const begin = start + mark.length, inWord = mark[0] === "_";
  if (missing.has(mark) || !text[begin] || /\s/.test(text[begin]) || (inWord && word(text[start - 1]))) return -1;
  for (let i = text.indexOf(mark, begin); i >= 0; i = text.indexOf(mark, i + 1)) {
    if (i === begin || /\s/.test(text[i - 1]) || text[i - 1] === "\\" || (inWord && word(text[i + mark.length]))) continue;
    if (mark.length === 1 && (text[i + 1] === mark || text[i - 1] === mark)) continue;
    return i;
  }
  missing.add(mark);
  return -1;
}

// An address that a link may have, or null.
function address(text) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(text).protocol) ? text : null;
  } catch {
    return null;
  }
}

const link = (href, ...text) => make("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...text);

// Shows a growing source. Only its last block may still change: the ones before stay as they are.
class Growing {
  constructor(element, paint) {
    Object.assign(this, { element, paint, start: 0, kept: 0 });
  }

  show(source) {
    const lines = linesOf(source, this.start), shown = [...blocks(lines, this.paint)];
    while (this.element.childNodes.length > this.kept) this.element.lastChild.remove();
    this.element.append(...shown.map(([element]) => element));
    if (shown.length < 2) return;
    this.kept += shown.length - 1;
    this.start = lines[shown.at(-1)[2]].from;
  }
}

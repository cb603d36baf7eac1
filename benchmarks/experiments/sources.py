"""Free texts that Debian's packages bring, as plain-text documents with names and licences.

Each source turns an unpacked package into documents: markup, verse numbers and footnotes are removed, and lines are
joined to paragraphs.
"""

from __future__ import annotations

import html
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Documents = Iterator[tuple[str, str]]  # name within the source, text


@dataclass(frozen=True)
class Source:
    """A source of documents: its packages, its licence, how to read it, and which of its documents are held out.

    ``every`` holds out each document whose number in the source is a multiple of it, in place of names.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    licence: str
    read: Callable[[Path], Documents]
    held_out: tuple[str, ...] = ()
    every: int | None = None

    def is_held_out(self, document: str, number: int) -> bool:
        return number % self.every == self.every - 1 if self.every else document in self.held_out


# Books that are held out of every translation and commentary, by their OSIS names.
HELD_OUT_BOOKS = ("Ruth", "Jonah", "Mark", "1John")
_KJV_NAMES = {"1Jn": "1John"}


def novels(root: Path) -> Documents:
    """Jane Austen's novels, from the data of an R package: objects one after the other, each compressed."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        reader = zlib.decompressobj()
        lines = _r_strings(reader.decompress(data[4:]))
        data = reader.unused_data
        yield lines[0].title(), paragraphs("\n".join(lines))


def _r_strings(serialized: bytes) -> list[str]:
    """Return the character vector that R serialized: (flags, length, bytes) for each string."""
    at = serialized.index(b"\x00\x00\x00\x10") + 4
    count = int.from_bytes(serialized[at : at + 4], "big")
    at += 4
    strings = []
    for _ in range(count):
        length = int.from_bytes(serialized[at + 4 : at + 8], "big", signed=True)
        at += 8
        strings.append(serialized[at : at + max(length, 0)].decode())
        at += max(length, 0)
    return strings


def king_james(root: Path) -> Documents:
    """The King James Bible by book, printed by the package's own program. Verses of a chapter form a paragraph."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "-l9999", "gen1:1-rev22:21"]
    printed = subprocess.run(command, capture_output=True, check=True, stdin=subprocess.DEVNULL).stdout.decode(
        "latin-1"
    )
    books: dict[str, dict[str, list[str]]] = {}
    for book, chapter, verse in re.findall(r"^(.+?)\s*(\d+):\d+ (.*)$", printed, re.MULTILINE):
        books.setdefault(_KJV_NAMES.get(book, book), {}).setdefault(chapter, []).append(verse.strip())
    for name, chapters in books.items():
        yield name, "\n\n".join(" ".join(verses) for verses in chapters.values())


def sword(module: str, marks: str) -> Callable[[Path], Documents]:
    """Return a reader of a SWORD module, whose compressed blocks are the documents.

    ``marks``: letter of the module's files, b for books and c for chapters.
    """

    def read(root: Path) -> Documents:
        folder = root / "usr/share/sword/modules" / module
        for part in ("ot", "nt"):
            index, blocks = ((folder / f"{part}.{marks}z{end}").read_bytes() for end in "sz")
            for offset, size, _ in struct.iter_unpack("<III", index):
                text = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace") if size else ""
                name = re.search(r'osisID="([^"]+)"', text)
                if name and len(text) > 2000:
                    yield name[1], without_osis(text)

    return read


def without_osis(text: str) -> str:
    """Return the prose of an OSIS text: headings, notes and tables are dropped, paragraphs kept."""
    for element in ("note", "title", "table"):
        text = re.sub(rf"<{element}\b(?:[^>]*[^/])?>.*?</{element}>", " ", text, flags=re.DOTALL)
    text = re.sub(r'<div [sS]ID="[^"]*" type="x-p"/>|<(?:chapter|lg|p)\b[^>]*>', "\n\n", text)
    return paragraphs(html.unescape(re.sub(r"<[^>]*>", "", text)))


def wordnet(root: Path) -> Documents:
    """Definitions of WordNet, two hundred to a document: `word: definition; "example"`."""
    entries = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (root / "usr/share/wordnet" / f"data.{part}").read_text(encoding="utf-8").splitlines():
            head, _, gloss = line.partition(" | ")
            if gloss and '"' in gloss:  # those with an example: the others are mostly names of species
                entries.append(f"{head.split()[4].split('(')[0].replace('_', ' ')}: {gloss.strip()}")
    for at in range(0, len(entries), 200):
        yield f"entries from {at}", "\n\n".join(entries[at : at + 200])


def python_pages(root: Path) -> Documents:
    """Prose of Python's documentation, without code blocks and directives."""
    pages = root / "usr/share/doc/python3.11/html/_sources"
    for page in sorted(
        path for part in ("tutorial", "library", "howto", "faq") for path in (pages / part).glob("*.txt")
    ):
        yield page.relative_to(pages).as_posix(), without_markup(page.read_text(encoding="utf-8"))


def without_markup(text: str) -> str:
    """Return the paragraphs of reStructuredText: what is indented after `::` or a directive, and roles, are dropped."""
    kept = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if any(line.lstrip().startswith((".. ", ">>>", "...", "|", "+--", "===", ":")) for line in lines):
            continue
        prose = " ".join(line.strip() for line in lines if not re.fullmatch(r"[=\-~^*#\"'+.]{3,}", line.strip()))
        prose = re.sub(r":[\w:+-]+:`[~!]?([^`<]*)(?: ?<[^>]*>)?`", r"\1", prose)
        prose = re.sub(r"`([^`<]*?) ?<[^>]*>`_+", r"\1", prose)
        prose = re.sub(r"\*\*?([^*\s][^*]*)\*\*?", r"\1", prose).replace("``", "").replace("::", ":")
        if len(prose) > 60 and prose[0].isupper() and prose[-1] in ".:":
            kept.append(prose)
    return paragraphs("\n\n".join(kept))


def paragraphs(text: str) -> str:
    """Join the lines of each paragraph, with plain quotes and dashes; empty lines stay between paragraphs."""
    for fancy, plain in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("—", "--"), ("–", "-"), ("\u00a0", " ")):
        text = text.replace(fancy, plain)
    joined = (re.sub(r"\s+", " ", block).strip() for block in re.split(r"\n\s*\n", text))
    return "\n\n".join(block for block in joined if block)


SOURCES = (
    Source(
        "austen",
        "six novels of Jane Austen",
        ("r-cran-janeaustenr",),
        "public domain",
        novels,
        held_out=("Persuasion",),
    ),
    Source(
        "king-james",
        "the King James Bible",
        ("bible-kjv", "bible-kjv-text"),
        "public domain (the text; its programs are not used beyond reading it)",
        king_james,
        held_out=HELD_OUT_BOOKS,
    ),
    Source(
        "world-english",
        "the World English Bible",
        ("sword-text-web",),
        "public domain",
        sword("texts/ztext/engWEB2015eb", "b"),
        held_out=HELD_OUT_BOOKS,
    ),
    Source(
        "henry",
        "Matthew Henry's Concise Commentary",
        ("sword-comm-mhcc",),
        "public domain",
        sword("comments/zcom/mhcc", "b"),
        held_out=HELD_OUT_BOOKS,
    ),
    Source(
        "spurgeon",
        "C. H. Spurgeon's Treasury of David",
        ("sword-comm-tdavid",),
        "public domain",
        sword("comments/zcom/tdavid", "c"),
        held_out=("Ps.15", "Ps.39", "Ps.79", "Ps.121"),
    ),
    Source("wordnet", "definitions of WordNet 3.0", ("wordnet-base",), "WordNet 3.0 licence (free)", wordnet, every=50),
    Source(
        "python",
        "prose of Python's documentation",
        ("python3.11-doc",),
        "PSF licence 2 (free)",
        python_pages,
        every=30,
    ),
)

"""Large pages for the memory that a load allocates: what is moved there, and what is left alone."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from melt_runtime import Runtime
from melt_runtime.backends import large_pages
from melt_runtime.backends.large_pages import NewMemory

SIZE = 16 << 20


def mapping() -> mmap.mmap:
    """Anonymous memory of which nothing is in use yet."""
    return mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def kilobytes(memory: mmap.mmap, field: str) -> int:
    """Sum a field of the mappings that lie in this memory."""
    first, total, inside = address(memory), 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(" ")
        start, dash, _end = name.partition("-")
        if dash and not name.endswith(":"):
            inside = first <= int(start, 16) < first + SIZE
        elif inside and name == field + ":":
            total += int(rest.split()[0])
    return total


@pytest.fixture
def page_size() -> int:
    """The bytes of a large page, where Linux moves memory there when it is asked."""
    if sys.platform != "linux":
        pytest.skip("only Linux is asked for large pages")
    size = large_pages._page_size()
    if size is None:
        pytest.skip("this system has no large pages")
    with mapping() as memory:
        np.frombuffer(memory, np.uint8).fill(1)
        if large_pages._system().madvise(-(-address(memory) // size) * size, size, large_pages._COLLAPSE) != 0:
            pytest.skip("this Linux does not move memory into large pages at once")
    return size


def test_memory_allocated_since_is_moved_and_keeps_its_contents(page_size: int) -> None:
    older = mapping()
    np.frombuffer(older, np.uint8).fill(1)
    before = NewMemory()
    newer, unused = mapping(), mapping()
    values = np.frombuffer(newer, np.uint64)
    values[:] = np.arange(len(values))
    thread = before.in_large_pages()
    assert thread is not None
    thread.join(60)
    assert kilobytes(newer, "AnonHugePages") * 1024 >= SIZE - 2 * page_size  # its ends may not be whole pages
    assert (values == np.arange(len(values), dtype=np.uint64)).all()
    assert kilobytes(older, "AnonHugePages") == 0
    assert kilobytes(unused, "Rss") == 0


def test_what_is_freed_meanwhile_does_no_harm(page_size: int) -> None:
    memory = mapping()
    np.frombuffer(memory, np.uint8).fill(1)
    first = -(-address(memory) // page_size) * page_size
    memory.close()
    large_pages._collapse([(first, first + page_size)], page_size)
    assert list(large_pages._used([(first, first + page_size)], page_size)) in ([], [(first, first + page_size)])


def test_what_malloc_gave_back_meanwhile_stays_given_back(page_size: int) -> None:
    memory = mapping()
    np.frombuffer(memory, np.uint8).fill(1)
    first = -(-address(memory) // page_size) * page_size
    memory.madvise(mmap.MADV_DONTNEED)
    memory[first - address(memory)] = 1  # still in use
    large_pages._collapse([(first, first + page_size)], page_size)
    assert kilobytes(memory, "Rss") * 1024 < page_size


def test_a_process_that_may_start_no_more_threads_is_left_as_it_is(
    page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refused)
    before = NewMemory()
    memory = mapping()
    np.frombuffer(memory, np.uint8).fill(1)
    assert before.in_large_pages() is None


def test_a_hundred_thousand_mappings_are_compared_at_once() -> None:
    code = (
        "from melt_runtime.backends.large_pages import _without\n"
        "before = [(at, at + 1) for at in range(0, 300_000, 3)]\n"
        "now = [(at, at + 2) for at in range(0, 300_000, 3)]\n"
        "assert list(_without(now, before)) == [(at + 1, at + 2) for at in range(0, 300_000, 3)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_load_asks_once(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(NewMemory, "in_large_pages", lambda memory: asked.append(id(memory)))
    Runtime.load(tiny_package, check_hashes=False)
    assert len(asked) == 1


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_linux_is_not_asked_where_it_must_not_or_cannot(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting, encoding="ascii")
    monkeypatch.setattr(large_pages, "_SETTING", tmp_path / "enabled")
    before = NewMemory()
    memory = mapping()
    np.frombuffer(memory, np.uint8).fill(1)
    assert before.in_large_pages() is None


def test_linux_is_not_asked_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "available_memory", lambda: 100 << 20)
    before = NewMemory()
    memory = mapping()
    np.frombuffer(memory, np.uint8).fill(1)
    assert before.in_large_pages() is None


def test_without_a_list_of_mappings_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_MAPS", tmp_path / "maps")
    assert NewMemory().in_large_pages() is None


numbers = st.lists(st.integers(0, 40), unique=True, max_size=12).map(sorted)
ranges = numbers.map(lambda ends: list(zip(ends[::2], ends[1::2], strict=False)))


@given(ranges, ranges)
def test_what_was_there_before_is_left_out(now: list[tuple[int, int]], before: list[tuple[int, int]]) -> None:
    def members(these: list[tuple[int, int]]) -> list[int]:
        return [number for first, end in these for number in range(first, end)]

    found = list(large_pages._without(now, before))
    assert members(found) == sorted(set(members(now)) - set(members(before)))
    assert all(first < end for first, end in found)

"""The files of measurements: whatever lies in their place is ignored once, and no process loses what another wrote."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from fastroute.runtime import json_cache
from fastroute.runtime.json_cache import MOST_ENTRIES, JsonCache, cache_folder

ENTRY = {"batch": 8}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROUTE_CACHE", str(tmp_path))
    return tmp_path


def put(content: bytes):
    return lambda path: path.write_bytes(content)


HOSTILE = {
    "empty": put(b""),
    "cut": put(b'{"a": {"batch"'),
    "binary": put(b"\xff\xfe\x00\x01"),
    "list": put(b"[1, 2]"),
    "null": put(b"null"),
    "deep": put(b"[" * 200_000),
    "deep object": put(b'{"a":' * 200_000),
    "large number": put(b'{"a": ' + b"1" * 5000 + b"}"),
    "large": lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 300 << 20),
    "folder": lambda path: path.mkdir(),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "pipe": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path),
    "memory of the process": lambda path: path.symlink_to("/proc/self/mem"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_cache_is_ignored_with_one_warning(folder, caplog, name):
    HOSTILE[name](folder / "x.json")
    cache, start = JsonCache("x.json"), time.perf_counter()
    with caplog.at_level(logging.WARNING, "fastroute"):
        assert cache.read() == {} and cache.read() == {}
        written = cache.remember("a", ENTRY)
    assert time.perf_counter() - start < 2
    assert len(caplog.records) == 1 and str(cache.path) in caplog.text
    # Whatever a new file can take the place of is whole again.
    assert written == (name != "folder") and cache.read() == ({"a": ENTRY} if written else {})


@pytest.mark.parametrize("name", ["folder", "endless device", "pipe", "link to itself"])
def test_what_lies_in_place_of_the_lock(folder, name):
    HOSTILE[name](folder / "x.json.lock")
    cache, start = JsonCache("x.json"), time.perf_counter()
    written = cache.remember("a", ENTRY)
    assert time.perf_counter() - start < 2 and cache.read() == ({"a": ENTRY} if written else {})


def test_a_lock_that_is_held_for_long_is_not_waited_for(folder, monkeypatch):
    monkeypatch.setattr(json_cache, "PATIENCE", 0.1)
    with json_cache.FileLock(folder / "x.json.lock"):
        done = []
        thread = threading.Thread(target=lambda: done.append(JsonCache("x.json").remember("a", ENTRY)))
        thread.start()
        thread.join()
    assert done == [False] and not (folder / "x.json").exists()


def test_entries_that_could_not_be_written_again_are_left_out(folder):
    nested: list = []
    for _ in range(500):
        nested = [nested]
    (folder / "x.json").write_text(json.dumps({"a": ENTRY, "deep": {"x": nested}, "text": "x", "odd": {"x": "\ud800"}}))
    cache = JsonCache("x.json")
    assert cache.read() == {"a": ENTRY, "odd": {"x": "\ud800"}}
    assert cache.remember("b", ENTRY) and set(cache.read()) == {"a", "odd", "b"}


@pytest.mark.slow
def test_the_oldest_entries_go(folder):
    (folder / "x.json").write_text(json.dumps({str(i): ENTRY for i in range(MOST_ENTRIES)}))
    cache = JsonCache("x.json")
    assert cache.remember("0", ENTRY) and cache.remember("new", ENTRY)
    left = list(cache.read())
    assert len(left) == MOST_ENTRIES and left[:1] == ["2"] and left[-2:] == ["0", "new"]


@pytest.mark.parametrize("name", ["/proc/nowhere", "/dev/null", "x" * 5000, "/dev/null/below", "a\udcff"])
def test_folders_that_cannot_be(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FASTROUTE_CACHE", name)
    written = JsonCache("x.json").remember("a", ENTRY)
    assert JsonCache("x.json").read() == ({"a": ENTRY} if written else {})


def test_where_the_cache_lies(folder, monkeypatch, tmp_path):
    assert cache_folder() == tmp_path
    for unset in (None, ""):
        monkeypatch.delenv("FASTROUTE_CACHE", raising=False)
        if unset is not None:
            monkeypatch.setenv("FASTROUTE_CACHE", unset)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "fastroute"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "fastroute"


def write(folder: str, number: int, entries: int) -> None:
    os.environ["FASTROUTE_CACHE"] = folder
    cache = JsonCache("x.json")
    for i in range(entries):
        assert cache.remember(f"{number}-{i}", {"value": i, "text": "x" * 100})
        table = json.loads((Path(folder) / "x.json").read_text())
        # Of its own entries none is lost; those of others are whole.
        assert all(f"{number}-{j}" in table for j in range(i + 1)), sorted(table)
        assert all(len(entry["text"]) == 100 for entry in table.values())


@pytest.mark.slow
@pytest.mark.parametrize("entries", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_sixteen_processes_write_one_folder(folder, entries):
    # Forked, or sixteen imports of torch would take most of the time; they use nothing of it.
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=write, args=(str(folder), n, entries)) for n in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 16
    assert set(JsonCache("x.json").read()) == {f"{n}-{i}" for n in range(16) for i in range(entries)}


def test_threads_of_one_process_write_one_folder(folder):
    threads = [threading.Thread(target=write, args=(str(folder), n, 4)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(JsonCache("x.json").read()) == {f"{n}-{i}" for n in range(8) for i in range(4)}

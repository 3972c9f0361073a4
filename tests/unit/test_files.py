from __future__ import annotations

import gzip
import hashlib
import multiprocessing
from pathlib import Path

import pytest

from lkspec.files import atomic_dir, atomic_path, cache_dir, read_jsonl, sha256_of, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "é日")
    assert (tmp_path / "a.txt").read_bytes() == "é日".encode()


def test_failed_folder_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with atomic_dir(tmp_path / "model") as temporary:
            (temporary / "half").write_text("x")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert names(tmp_path) == []


def test_folder_appears_whole(tmp_path):
    with atomic_dir(tmp_path / "model") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("x")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "inner" / "a").read_text() == "x"
    assert names(tmp_path) == ["model"]


def test_folder_made_meanwhile_by_another_stays(tmp_path):
    with atomic_dir(tmp_path / "model") as ours:
        (ours / "a").write_text("ours")
        with atomic_dir(tmp_path / "model") as theirs:
            (theirs / "a").write_text("theirs")
    assert (tmp_path / "model" / "a").read_text() == "theirs"
    assert names(tmp_path) == ["model"]


def fill(folder: Path, number: int, barrier) -> None:
    with atomic_dir(folder) as temporary:
        for name in "abcd":
            (temporary / name).write_text(str(number))
        barrier.wait(timeout=30)  # all have filled theirs, now all rename at once


def test_processes_that_make_the_same_folder_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    workers = [context.Process(target=fill, args=(tmp_path / "model", i, barrier)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert names(tmp_path) == ["model"]
    assert len({(tmp_path / "model" / name).read_text() for name in "abcd"}) == 1  # one process's, not a mixture


def test_a_folder_that_is_replaced_is_there_until_the_new_one_is(tmp_path):
    with atomic_dir(tmp_path / "model") as old:
        (old / "a").write_text("old")
    with atomic_dir(tmp_path / "model", replace=True) as new:
        (new / "b").write_text("new")
        assert names(tmp_path / "model") == ["a"]
    assert names(tmp_path / "model") == ["b"]
    assert names(tmp_path) == ["model"]


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path):
    with atomic_dir(tmp_path / "model") as old:
        (old / "a").write_text("old")

    def interrupted() -> None:
        with atomic_dir(tmp_path / "model", replace=True):
            raise RuntimeError("interrupted")

    def moved_away() -> None:
        with atomic_dir(tmp_path / "model", replace=True) as temporary:
            temporary.rename(tmp_path / "elsewhere")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert names(tmp_path) == ["model"]
    with pytest.raises(OSError, match="model"):
        moved_away()
    assert names(tmp_path) == ["elsewhere", "model"]
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_files_of_a_folder_are_readable_by_all(tmp_path):
    with atomic_dir(tmp_path / "model") as temporary:
        (temporary / "a").touch(mode=0o600)
    assert (tmp_path / "model" / "a").stat().st_mode & 0o777 == 0o644


def test_rename_that_fails_for_another_reason_is_an_error(tmp_path):
    def moved_away() -> None:
        with atomic_dir(tmp_path / "model") as temporary:
            temporary.rename(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="model"):
        moved_away()


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LKSPEC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "lkspec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lkspec"
    monkeypatch.setenv("LKSPEC_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_json_lines_are_numbered_as_an_editor_shows_them(tmp_path):
    lines = '{"a": "one\u2028line"}\n\n{"b": 2}\r\n'
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8", newline="")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8", newline="") as file:
        file.write(lines)
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert list(read_jsonl(tmp_path / name)) == [(1, {"a": "one\u2028line"}), (3, {"b": 2})]

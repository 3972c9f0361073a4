"""A run's folder is held by one process at a time, and holding it leaves nothing behind."""

from __future__ import annotations

from lkspec.runs.lock import held, is_held, try_lock


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    x, y = tmp_path / "runs" / "x", tmp_path / "runs" / "y"
    assert not is_held(x)
    with held(x) as first:
        assert first
        assert is_held(x)
        assert not is_held(y)
        with held(x) as second:
            assert not second
        assert is_held(x), "who did not get it does not let go of it"
    with held(x) as third:
        assert third


def test_holding_and_looking_leave_nothing_behind_but_runs(tmp_path):
    with held(tmp_path / "runs" / "x"):
        pass
    assert not is_held(tmp_path / "runs" / "x")
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "runs" / "x"):
        (tmp_path / "runs" / "x").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]


def test_a_lock_file_that_was_removed_meanwhile_is_none(tmp_path):
    first = try_lock(tmp_path / "lock")
    assert first is not None
    assert try_lock(tmp_path / "lock") is None
    (tmp_path / "lock").unlink()
    second = try_lock(tmp_path / "lock")
    assert second is not None, "a new file, a new lock"
    first.close()
    second.close()

"""What a person sees of long work."""

from __future__ import annotations

import sys

import pytest

from pipeline.storage.progress import Progress, duration


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_rate_is_that_of_the_last_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("downloading a.zip", 2000 * 2**20, unit="MiB", scale=2.0**-20)
    for _ in range(100):  # 10 MiB/s for 100 s, then 1 MiB/s
        clock.now_s += 1
        progress.add(10 * 2**20)
    assert lines(capsys)[-1] == "downloading a.zip: 1,000 of 2,000 MiB (50%), 10.0 MiB/s, 100 s left"
    for _ in range(20):
        clock.now_s += 1
        progress.add(2**20)
    assert lines(capsys)[-1] == "downloading a.zip: 1,020 of 2,000 MiB (51%), 1.0 MiB/s, 16 min left"


def test_what_an_earlier_run_did_does_not_count_into_the_rate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("a", 0, unit="files")
    progress.restart(900, 1000)
    clock.now_s += 10
    progress.add(50)
    assert lines(capsys) == ["a: 950 of 1,000 files (95%), 5.0 files/s, 10 s left"]
    progress.restart(0, 1000)  # the server starts over
    clock.now_s += 10
    progress.add(20)
    assert lines(capsys) == ["a: 20 of 1,000 files (2%), 2.0 files/s, 8 min left"]
    progress.done()
    assert lines(capsys) == ["a: 20 files in 20 s, 3.5 files/s"]  # 50 + 20 in 20 s


def test_the_last_line_tells_what_an_earlier_run_did_from_the_rest(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("a", 0, unit="files")
    progress.restart(30, 31)
    progress.done()
    clock.now_s += 2
    progress.add()
    progress.done()
    assert lines(capsys) == ["a: 30 files, all finished before", "a: 31 files, 1 of them in 2 s, 0.5 files/s"]


def test_one_is_counted_in_the_singular(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("a", 1, unit="pictures")
    clock.now_s += 10
    progress.add()
    progress.done()
    assert lines(capsys) == ["a: 1 of 1 picture (100%), 0.1 pictures/s", "a: 1 picture in 10 s, 0.1 pictures/s"]


def test_lines_come_every_ten_seconds_and_know_no_end_without_a_total(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("a", 0, unit="files")
    for _ in range(25):
        clock.now_s += 1
        progress.add(200)
    assert lines(capsys) == ["a: 2,000 files, 200 files/s", "a: 4,000 files, 200 files/s"]


def test_a_terminal_gets_a_bar_on_one_line(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    progress = Progress("a.zip", 100, unit="MiB")
    clock.now_s += 1
    progress.add(25)
    assert capsys.readouterr().err == "a.zip [#####..............] 25 of 100 MiB (25%), 25.0 MiB/s, 3 s left\r"
    monkeypatch.setenv("COLUMNS", "40")
    clock.now_s += 1
    progress.add(25)
    assert capsys.readouterr().err == "a.zip: 50 of 100 MiB (50%), 25.0 MiB/s,\r"
    progress.done()
    assert capsys.readouterr().err == f"{'a.zip: 50 MiB in 2 s, 25.0 MiB/s':<39}\n"


def test_what_is_counted_may_be_said_with_more(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("row seed 1", 100, unit="steps")
    clock.now_s += 20
    progress.add(10, note=lambda rate: f"{rate * 8:.0f} pictures/s")
    assert lines(capsys) == ["row seed 1: 10 of 100 steps (10%), 0.5 steps/s, 4 pictures/s, 3 min left"]
    progress.say("validation")
    assert lines(capsys) == ["row seed 1: validation"]


def test_durations_are_told_as_people_tell_them() -> None:
    told = {0.4: "0 s", 119.4: "119 s", 120.0: "2 min", 3600.0: "60 min", 7500.0: "2.1 h", 432_000.0: "5.0 days"}
    assert {seconds: duration(seconds) for seconds in told} == told

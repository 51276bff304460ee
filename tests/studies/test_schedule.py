"""The simulated schedule, on jobs few enough to place by hand."""

from __future__ import annotations

import pytest

from studies.schedule import Job, Placed, Preemptions, simulate, utilisation


def times(placed: list[Placed]) -> list[tuple[float, float, tuple[int, ...]]]:
    return [(at.start_s, at.end_s, at.pools) for at in placed]


def test_the_longest_job_starts_first_and_a_free_pool_takes_the_next() -> None:
    # pool 0: c (5 s); pool 1: a (3 s), then b (2 s). Divided evenly it would be 10 / 2 = 5 s as well, by luck.
    jobs = [Job(name="a", duration_s=3), Job(name="b", duration_s=2), Job(name="c", duration_s=5)]
    placed = simulate(jobs, pools=2)
    assert times(placed) == [(0, 3, (1,)), (3, 5, (1,)), (0, 5, (0,))]
    assert utilisation(placed, pools=2) == [1.0, 1.0]


def test_three_equal_jobs_on_two_pools_take_two_rounds() -> None:
    # 12 s of work on two pools is not 6 s but 8: the third job has a pool to itself.
    placed = simulate([Job(name="a", duration_s=4)] * 3, pools=2)
    assert max(at.end_s for at in placed) == 8
    assert utilisation(placed, pools=2) == [1.0, 0.5]


def test_a_job_for_two_pools_waits_until_both_are_free_and_lets_shorter_ones_pass() -> None:
    # x is the longest but not ready before 1 s. a (4 s) and b (2 s) start; at 2 s one pool is free, too few for x, so
    # c (1 s) takes it; at 4 s x starts on both.
    jobs = [
        Job(name="x", duration_s=10, pools=2, ready_s=1),
        Job(name="a", duration_s=4),
        Job(name="b", duration_s=2),
        Job(name="c", duration_s=1),
    ]
    assert times(simulate(jobs, pools=2)) == [(4, 14, (0, 1)), (0, 4, (0,)), (0, 2, (1,)), (2, 3, (1,))]


def test_a_job_starts_after_those_it_comes_after() -> None:
    # the evaluation waits for both seeds, and then goes before another row's longer ones
    seeds = [Job(name="row", duration_s=3), Job(name="row", duration_s=2)]
    evaluation = Job(name="row", duration_s=0.5, after=(0, 1), first=True)
    others = [Job(name="other", duration_s=1), Job(name="other", duration_s=1)]
    placed = times(simulate([*seeds, evaluation, *others], pools=1))
    assert placed == [(0, 3, (0,)), (3, 5, (0,)), (5, 5.5, (0,)), (5.5, 6.5, (0,)), (6.5, 7.5, (0,))]


def test_pools_stand_still_until_data_is_ready() -> None:
    placed = simulate([Job(name="a", duration_s=2, ready_s=6)], pools=1)
    assert times(placed) == [(6, 8, (0,))]
    assert utilisation(placed, pools=1) == [0.25]


def test_a_job_that_needs_more_pools_than_there_are_is_named() -> None:
    with pytest.raises(ValueError, match="big needs 2 pools at once, and there are 1"):
        simulate([Job(name="big", duration_s=1, pools=2)], pools=1)


def test_without_jobs_there_is_nothing_to_schedule() -> None:
    assert simulate([], pools=2) == []
    assert utilisation([], pools=2) == [0.0, 0.0]


def test_a_preempted_job_restarts_and_repeats_what_it_had_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 s of work, saved every 3 s. It runs 4 s, is lost, and goes on from 3 s after a restart of 1 s; runs 5 s more
    # (8 s done), is lost, and goes on from 6 s: 4 + 1 + 5 + 1 + 4 = 15 s.
    draws = iter([4.0, 5.0, 100.0])
    monkeypatch.setattr("studies.schedule.random.Random.expovariate", lambda self, rate: next(draws))
    job = Job(name="a", duration_s=10, saves_every_s=3)
    (placed,) = simulate([job], pools=1, preemptions=Preemptions(mean_s=50, restart_s=1))
    assert (placed.end_s, placed.preempted) == (15, 2)


def test_preemptions_are_the_same_every_time_and_cost_about_what_theory_says() -> None:
    # Each of about 1000 h / 10 h = 100 preemptions costs 0.2 h of restart and half an interval of 1 h.
    job = Job(name="a", duration_s=1000, saves_every_s=1)
    preemptions = Preemptions(mean_s=10, restart_s=0.2)
    first, second = (simulate([job], pools=1, preemptions=preemptions)[0] for _ in range(2))
    assert first == second
    assert first.end_s == pytest.approx(1000 + first.preempted * 0.7, rel=0.02)
    assert 80 < first.preempted < 135
    assert simulate([job], pools=1, preemptions=Preemptions(mean_s=1e12, restart_s=1))[0].end_s == 1000


def test_a_job_on_two_pools_is_lost_twice_as_often() -> None:
    def count(pools: int) -> int:
        job = Job(name="a", duration_s=2000, pools=pools, saves_every_s=0.1)
        return simulate([job], pools=2, preemptions=Preemptions(mean_s=10, restart_s=0))[0].preempted

    assert count(2) == pytest.approx(2 * count(1), rel=0.25)


def test_a_job_that_would_never_end_is_refused() -> None:
    job = Job(name="slow", duration_s=36e5, saves_every_s=36e3)
    with pytest.raises(ValueError, match=r"slow saves every 10.0 h and would be preempted every 1.0 h"):
        simulate([job], pools=1, preemptions=Preemptions(mean_s=3600, restart_s=0))

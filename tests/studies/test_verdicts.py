from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.params.schema import VerdictConfig
from studies import verdicts
from studies.verdicts import SHAPES, Simulation, World
from tests.helpers.shared import PROJECT


@pytest.fixture
def simulation() -> Simulation:
    """2,000 draws: a share of 5 % is known to 0.5, its standard error."""
    return Simulation(VerdictConfig(), 2000)


@pytest.mark.parametrize("trainings", [1, 5])
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0])
def test_each_verdict_is_wrong_at_most_one_time_in_twenty(
    simulation: Simulation, seeds: int, spread: float, trainings: int
) -> None:
    at_the_margin = simulation.shares(World(seeds=seeds, spread=spread, difference=-1.0, trainings=trainings))
    equal = simulation.shares(World(seeds=seeds, spread=spread, trainings=trainings))
    assert max(at_the_margin["reproduced"], equal["below"], equal["above"]) <= 5 + 4 * 0.5


def test_five_seeds_of_a_usual_spread_tell_a_reproduction_from_a_loss_of_two_points(simulation: Simulation) -> None:
    equal, lost = (simulation.shares(World(seeds=5, spread=0.3, difference=d)) for d in (0.0, -2.0))
    assert equal["reproduced"] > 55 and equal["below"] + equal["above"] < 8
    assert lost["below"] > 99


def test_the_predictive_interval_holds_as_often_as_it_says(simulation: Simulation) -> None:
    for seeds in (2, 3, 5, 10):
        for trainings in (1, 5):
            held = simulation.held(World(seeds=seeds, spread=0.3, trainings=trainings))
            assert 90 - 3 * 0.7 <= held <= 92.5, (seeds, trainings)  # a median's is a little wider than it must be


def test_every_shape_has_its_median_at_the_true_difference_or_says_how_far(simulation: Simulation) -> None:
    for name, shape in SHAPES.items():
        # One in ten 4 low: half of the draws lie under x where 0.9 Phi(x) + 0.1 = 0.5, x = -0.14.
        centre = -0.14 if "low" in name else 0.0
        assert np.median(shape(np.random.default_rng(0), (100_000,))) == pytest.approx(centre, abs=0.02)


def test_the_same_settings_print_the_same_tables_and_write_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["verdicts", "--draws", "40"])
    printed = []
    for _ in range(2):
        verdicts.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    cells = re.findall(r"(\d+) / (\d+) / (\d+) / (\d+) \|", printed[0])
    assert len(cells) >= 2 * 16 * 5
    assert all(98 <= sum(map(int, cell)) <= 102 for cell in cells)  # each is rounded
    assert not list(tmp_path.iterdir())


def test_the_chart_is_written_where_it_is_asked_for(simulation: Simulation, tmp_path: Path) -> None:
    simulation.draws = 40
    for name in ("chart.svg", "again.svg", "chart.png"):
        verdicts.chart(simulation, str(tmp_path / name))
    assert (tmp_path / "chart.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("trainings", [1, 5])
def test_the_page_shows_what_the_rule_does(simulation: Simulation, trainings: int) -> None:
    text = (PROJECT / "studies/verdicts.md").read_text()
    _, grid, *_ = text.partition(f"Published figure of {verdicts.PUBLISHED[trainings]}: ")[2].split("\n\n")
    lines = [line.strip("| ").split(" | ") for line in grid.splitlines() if line.startswith("| 5 |")]
    assert [float(line[1]) for line in lines] == list(verdicts.SPREADS)
    for line in lines:
        for times, cell in zip(verdicts.DIFFERENCES, line[2:], strict=True):
            world = World(seeds=5, spread=float(line[1]), difference=-times, trainings=trainings)
            shares = list(simulation.shares(world).values())
            assert [float(share) for share in cell.split(" / ")] == pytest.approx(shares, abs=4), (line, times)


def test_the_page_names_its_command_and_its_chart() -> None:
    text = (PROJECT / "studies/verdicts.md").read_text()
    assert "`python -m studies.verdicts --chart studies/verdicts.svg`" in text and "(verdicts.svg)" in text
    assert (PROJECT / "studies/verdicts.svg").is_file()

from __future__ import annotations

import re
from pathlib import Path

from pipeline.params.schema import Params
from tests.helpers.report_rows import evaluated, figures, page_of, published, written


def test_classes_are_compared_with_the_published_checkpoint_the_largest_difference_first(
    params: Params, tmp_path: Path
) -> None:
    # Seed 0 is the only one. road 70 - 75 = -5, sky 90 - 88 = +2, car 50 - 50 = 0; bus is absent from the pictures.
    ours = figures("semantic", 0.8, per_class={"iou": {"car": 0.5, "sky": 0.9, "bus": None, "road": 0.7}})
    theirs = figures("semantic", 0.8044, per_class={"iou": {"car": 0.5, "sky": 0.88, "bus": None, "road": 0.75}})
    written(tmp_path, evaluated("published", [ours]))
    written(tmp_path, published("published", "semantic", theirs))
    page = page_of(params, tmp_path)
    lines = re.findall(
        r'<tr><th scope="row">(\w+)</th><td>([\w.]+)</td><td>([\w.]+)</td><td>([-+.\d]+)</td><td>',
        page.partition("<h4>")[2],
    )
    assert lines == [
        ("road", "70.00", "75.00", "-5.00"),
        ("sky", "90.00", "88.00", "+2.00"),
        ("car", "50.00", "50.00", "+0.00"),
        ("bus", "absent", "absent", "-"),
    ]
    assert "seed 0, the one at the median, less the published checkpoint evaluated here</h4>" in page


def test_without_a_published_checkpoint_classes_are_compared_between_seeds(params: Params, tmp_path: Path) -> None:
    # car 40, 60, 50: apart by 20; road 70, 71, 70: apart by 1.
    seeds = [
        figures("semantic", 0.7 + i / 100, per_class={"iou": {"road": road, "car": car}})
        for i, (road, car) in enumerate(((0.7, 0.4), (0.71, 0.6), (0.7, 0.5)))
    ]
    written(tmp_path, evaluated("ours", [*seeds]))
    page = page_of(params, tmp_path)
    car = '<th scope="row">car</th><td>40.00</td><td>50.00</td><td>60.00</td><td>20.00</td>'
    road = '<th scope="row">road</th><td>70.00</td><td>70.00</td><td>71.00</td><td>1.00</td>'
    assert 0 < page.index(car) < page.index(road)

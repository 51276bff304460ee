from __future__ import annotations

from typing import Any

import yaml

from pipeline.project.stages import project_stages, shown_folders
from tests.helpers.shared import PROJECT

CODE = ("m2f", "pipeline", "stages")


def is_code(path: str) -> bool:
    return path.partition("/")[0] in CODE


def test_the_package_stands_for_the_code_and_all_else_is_the_repositorys() -> None:
    repository: dict[str, Any] = yaml.safe_load((PROJECT / "dvc.yaml").read_text())
    made = yaml.safe_load(project_stages((PROJECT / "dvc.yaml").read_text()))
    package = made["stages"].pop("package")
    assert package == {
        "cmd": "python -m stages.package",
        "always_changed": True,
        "outs": [{"results/package.json": {"cache": False, "persist": True}}],
    }
    replaced = 0
    for stage in repository["stages"].values():
        definition = stage.get("do", stage)
        if any(map(is_code, definition.get("deps", ()))):
            definition["deps"] = [path for path in definition["deps"] if not is_code(path)] + ["results/package.json"]
            replaced += 1
    # a project's params.yaml has its checkpoints itself
    assert repository.pop("vars") == ["checkpoints.yaml"]
    published = repository["stages"]["published"]["do"]
    assert {"checkpoints.yaml": ["checkpoints.${key}"]} in published["params"]
    published["params"] = [each if isinstance(each, str) else "checkpoints.${key}" for each in published["params"]]
    assert made == repository
    assert replaced == 6  # all but those that always run


def test_comments_and_lists_besides_code_stay_as_they_are() -> None:
    text = project_stages(
        "# of the repository\nstages:\n  # why\n  a:\n    cmd: x\n    deps:\n        - results/a.json\n        - m2f\n"
        "        - pipeline/data\n        - stages/a.py\n    params:\n        - m2f.own\n"
    )
    assert "of the repository" not in text
    assert text.partition("  # why\n")[2] == (
        "  a:\n    cmd: x\n    deps:\n        - results/a.json\n        - results/package.json\n"
        "    params:\n        - m2f.own\n"
    )


def test_folders_of_metrics_and_plots_are_found() -> None:
    assert shown_folders("metrics:\n  - results/metrics\nplots:\n  - results/plots/a: {x: b}\n  - one.csv: {}\n") == [
        "results/metrics",
        "results/plots/a",
    ]
    assert shown_folders("stages: {}\n") == []

"""Promises that no single module can keep: what depends on what, and that every setting is read."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import m2f
from m2f.config import ModelConfig
from pipeline.params.load import load_params, read_settings
from pipeline.params.schema import Params
from pipeline.storage.results.folder import write_plot
from tests.helpers.imports import has_code, imported, modules, reached
from tests.helpers.project_copy import SECTIONS, Copy
from tests.helpers.shared import PROJECT

STAGES = ("ready", "fetch", "shard", "weights", "train", "evaluate", "published", "benchmark", "register")


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return read_settings(PROJECT / "params.yaml")


# Stages and settings


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_rooms_that_its_script_imports(pipeline: dict[str, Any], stage: str) -> None:
    definition = pipeline[stage]["do"]
    if definition.get("always_changed"):
        assert "deps" not in definition and "params" not in definition  # nothing decides whether it runs
        return
    listed = [path for path in definition["deps"] if not path.startswith("results/")]
    assert len(set(listed)) == len(listed)
    used = {_room(name) for name in reached(f"stages.{stage}") if has_code(name)}
    missing, idle = used - {*listed}, {*listed} - used
    assert not missing and not idle, f"dvc.yaml, {stage}: lacks {sorted(missing)}, does not need {sorted(idle)}"


def _room(module: str) -> str:
    """What dvc.yaml calls the place of a module: a package, a room of pipeline/, or the file of a stage."""
    parts = module.split(".")
    if parts[0] == "stages":
        return f"stages/{parts[1]}.py" if len(parts) > 1 else "stages/__init__.py"
    return "m2f" if parts[0] == "m2f" else "/".join(parts[:2])


@pytest.mark.parametrize("stage", STAGES)
def test_every_entry_of_params_is_a_stage_with_small_outs(pipeline: dict[str, Any], stage: str) -> None:
    definition = pipeline[stage]["do"]
    assert pipeline[stage]["foreach"] == f"${{{SECTIONS[stage]}}}"
    assert definition["cmd"] == f"python -m stages.{stage} ${{key}}"
    # persist keeps the run-cache off and the last result in place until the new one is whole
    paths = [f"results/{stage}/${{key}}.json"]
    if stage == "evaluate":
        paths += [
            "results/metrics/${key}.json",
            *(f"results/plots/{name}/${{key}}.csv" for name in ("curves", "confusion")),
        ]
    if stage == "shard":
        paths += ["results/plots/classes/${key}.csv"]
    assert definition["outs"] == [{path: {"cache": False, "persist": True}} for path in paths]
    assert not definition.keys() & {"metrics", "plots"}  # one that is missing would make DVC warn


def test_what_a_row_waits_for_is_known_before_its_stages_run(pipeline: dict[str, Any], tree: dict[str, Any]) -> None:
    for stage in ("evaluate", "train", "benchmark", "register"):
        assert pipeline[stage]["do"]["deps"][0] == "results/ready/${key}.json"
    assert pipeline["published"]["do"]["deps"][0] == "results/ready/${item.row}.json"
    assert next(iter(pipeline)) == "evaluate" and next(iter(tree["rows"])) == "shapes_tiny"  # ended before the others


def test_a_stage_depends_on_its_own_entry_and_what_that_names(pipeline: dict[str, Any]) -> None:
    row = {"rows.${key}", "presets.${item.preset}"}
    params = {stage: pipeline[stage]["do"].get("params", ()) for stage in STAGES}
    depends = {stage: {each for each in listed if isinstance(each, str)} for stage, listed in params.items()}
    assert depends == {
        "ready": set(), "fetch": set(), "weights": set(), "shard": {"datasets.${key}"},
        "train": row, "evaluate": row, "benchmark": row,
        "register": {*row, "weights.${item.weights}", "sites"},
        # DVC finds no preset of an entry of checkpoints
        "published": {"rows.${item.row}", "sites"},
    }  # fmt: skip
    in_other_files = [each for listed in params.values() for each in listed if not isinstance(each, str)]
    assert in_other_files == [{"checkpoints.yaml": ["checkpoints.${key}"]}]  # published's


def test_the_report_depends_on_nothing_and_is_always_run(pipeline: dict[str, Any]) -> None:
    report = pipeline["report"]
    assert report["always_changed"] is True
    assert not report.keys() & {"deps", "params"}
    assert report["outs"] == [{"reports": {"cache": False, "persist": True}}]


def test_every_row_writes_out_the_keys_that_dvc_reads(tree: dict[str, Any]) -> None:
    # DVC cannot fall back on a default: a key that a stage lists must be there.
    for name, row in tree["rows"].items():
        missing = {"dataset", "weights", "preset"} - set(row)
        assert not missing, f"rows.{name} lacks {sorted(missing)}"
        assert row["weights"] in tree["weights"], f"rows.{name}.weights"
        assert row["preset"] in tree["presets"], f"rows.{name}.preset"


def test_params_yaml_has_no_anchors_aliases_or_merges() -> None:
    # With them DVC drops what `dvc exp run -S` sets for one row, or changes other rows with it.
    tokens = yaml.scan((PROJECT / "params.yaml").read_text())
    met = [token for token in tokens if isinstance(token, yaml.AnchorToken | yaml.AliasToken)]
    assert not met, f"params.yaml, line {met[0].start_mark.line + 1}"


def test_params_yaml_is_short_enough_to_be_read(tree: dict[str, Any]) -> None:
    text = (PROJECT / "params.yaml").read_text()
    assert len(text.encode()) <= 28_000
    for name, row in tree["rows"].items():
        if "published" in row or "published_authors" in row:
            lines = re.search(rf"^  {name}:(?: #.*)?\n((?:    .*\n)+)", text, re.M)
            assert lines and 3 <= lines[1].count("\n") <= 8, name  # 8: a recipe, a task and what it trains on


def test_what_is_downloaded_names_its_terms(tree: dict[str, Any]) -> None:
    # They are part of a registered model's licence.
    for name, weights in load_params(PROJECT / "params.yaml").weights.items():
        assert weights.terms or not weights.url, f"weights.{name}"
    for name, dataset in tree["datasets"].items():
        assert dataset.get("terms") or "sources" not in dataset, f"datasets.{name}"


def test_every_setting_is_read_by_some_code(tree: dict[str, Any]) -> None:
    read: set[str] = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                read.update(a.value for a in node.args[1:2] if isinstance(a, ast.Constant))
    unread = {key for key in _fields(Params, set()) if key not in read}
    assert not unread, f"settings that no code reads: {sorted(unread)}"
    load_params(PROJECT / "params.yaml")  # and every key in the file is such a field


def _fields(type_: Any, seen: set[Any]) -> Iterator[str]:
    """Names of all fields of a dataclass and of the dataclasses in it."""
    if dataclasses.is_dataclass(type_):
        if type_ not in seen:
            seen.add(type_)
            hints = typing.get_type_hints(type_)
            for field in dataclasses.fields(type_):
                yield field.name
                yield from _fields(hints[field.name], seen)
    else:
        for argument in typing.get_args(type_):
            yield from _fields(argument, seen)


def test_the_settings_that_are_checked_reach_into_the_model() -> None:
    assert {"num_classes", "clip_norm", "short_sides", "oversample"} <= set(_fields(Params, set()))
    assert set(_fields(ModelConfig, set())) < set(_fields(Params, set()))


def test_no_stage_takes_shards_that_were_made_with_other_settings_than_params_yaml_has() -> None:
    for name, path in modules().items():
        if name.startswith("stages.") and name != "stages.shard":
            for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
                what = [ast.unparse(each) for each in (call.func, *call.args[:1])]
                assert what != ["read_result", "Manifest"], f"{name} is to take pipeline.data.shards.look's"


# Code


def test_imports_go_one_way() -> None:
    allowed = {"m2f": {"m2f"}, "pipeline": {"m2f", "pipeline"}, "stages": {"m2f", "pipeline", "stages"}}
    for name in modules():
        for other in imported(name):
            top = other.partition(".")[0]
            assert top not in allowed or top in allowed[name.partition(".")[0]], f"{name} imports {other}"


ROOMS = (
    "pipeline.submit", "pipeline.rehearsal", "pipeline.cost", "pipeline.export", "pipeline.registry", "pipeline.browse",
    "pipeline.project",
    "pipeline.prediction", "pipeline.training", "pipeline.evaluation", "pipeline.data.loader", "pipeline.data.shards",
    "pipeline.data.datasets", "pipeline.data", "pipeline.data.images", "pipeline.cluster", "pipeline.report",
    "pipeline.compute", "pipeline.tracking", "pipeline.comparison", "pipeline.runs", "pipeline.storage",
    "pipeline.provenance", "pipeline.params",
)  # fmt: skip
"""From top to bottom: a room imports those below it only."""

FORBIDDEN = {
    "pipeline.report": ("pipeline.training", "pipeline.evaluation"),
    "pipeline.data.shards": ("pipeline.data.loader",),
    "pipeline.evaluation": ("pipeline.tracking",),
    "pipeline.tracking": ("torch", "m2f", "pipeline.training"),
    "pipeline.comparison": ("torch", "m2f"),
    "pipeline.storage": ("torch", "m2f", "pipeline.training"),
    "pipeline.data.images": ("m2f", "pipeline.training"),
}
"""By room: what it and its folders never import, also where the order would allow it."""


def _place(module: str) -> int | None:
    """The place in ROOMS of the room that a module lies in; None: it is no module of pipeline/."""
    rooms = [place for place, room in enumerate(ROOMS) if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=lambda place: len(ROOMS[place]), default=None)


def test_rooms_import_those_below_them_only() -> None:
    for name in modules():
        place = _place(name)
        for other in imported(name) & modules().keys() if place is not None else ():
            below = _place(other)
            assert below is None or below >= place, f"{name} imports {other}, which is of a room above"


def test_some_rooms_never_import_some_others() -> None:
    for room, forbidden in FORBIDDEN.items():
        for name in modules():
            if name == room or name.startswith(f"{room}."):
                for other in imported(name):
                    met = [each for each in forbidden if other == each or other.startswith(f"{each}.")]
                    assert not met, f"{name} imports {other}"


def test_no_files_import_one_another_in_a_circle() -> None:
    for name in modules():
        for other in imported(name) & modules().keys() - {name}:
            way_back = _reached_at_once(other)
            assert name not in way_back, f"{name} imports {other}, which leads back to {name}"


def _reached_at_once(module: str) -> set[str]:
    """A module and those that it imports, directly or through others; packages on the way left out."""
    todo, seen = [module], set[str]()
    while todo:
        name = todo.pop()
        if name in modules() and name not in seen:
            seen.add(name)
            todo += imported(name)
    return seen


def test_a_room_has_two_to_nine_files_and_a_sentence_that_says_what_it_is() -> None:
    rooms = {path.parent for name, path in modules().items() if name.startswith("pipeline.")} - {PROJECT / "pipeline"}
    for room in rooms:
        files = [path for path in room.glob("*.py") if path.stem != "__init__"]
        assert 2 <= len(files) <= 9, f"{room.relative_to(PROJECT)} has {len(files)} files"
        body = ast.parse((room / "__init__.py").read_text()).body
        assert body and isinstance(body[0], ast.Expr), f"{room.relative_to(PROJECT)} does not say what it is"
        defined = [node for node in body[1:] if not isinstance(node, ast.ImportFrom | ast.Assign)]
        assert not defined, f"{room.relative_to(PROJECT)}/__init__.py does something"


def test_names_with_an_underscore_stay_in_their_file() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{name} imports {private} of {node.module}"


def test_importing_a_module_does_nothing_but_define_names() -> None:
    # What importing does besides is in no key of a module that does not hold what a training reaches.
    allowed = {
        "pipeline.data.loader.augmentation": "NO_ALBUMENTATIONS_UPDATE",
        "pipeline.registry.served_model": "set_model",  # MLflow's models from code
    }
    for name, path in modules().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
                assert allowed.get(name, "nothing") in ast.unparse(node), f"{name}: {ast.unparse(node)}"


def test_names_that_m2f_loads_when_they_are_used_are_those_that_keys_follow() -> None:
    (block,) = (node for node in ast.parse((PROJECT / "m2f/__init__.py").read_text()).body if isinstance(node, ast.If))
    hinted = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert hinted == m2f._HOME


WHOLE_FEATURES = {
    "compute/test_one_machine", "tracking/test_compare_page", "training/test_every_row", "cluster/test_tracking_server",
}  # fmt: skip
"""Test files that are of several files of their room."""


def test_tests_lie_where_what_they_test_lies() -> None:
    folder = PROJECT / "tests" / "pipeline"
    for path in folder.rglob("test_*.py"):
        place = path.relative_to(folder).with_suffix("")
        source = (PROJECT / "pipeline" / place).with_name(f"{place.name.removeprefix('test_')}.py")
        assert source.is_file() or place.as_posix() in WHOLE_FEATURES, f"tests/pipeline/{place}.py tests no such file"


def test_m2f_knows_nothing_but_torch_and_numbers() -> None:
    libraries = {"m2f", "torch", "numpy", "scipy", "safetensors"} | sys.stdlib_module_names
    for name, path in modules().items():
        if name.partition(".")[0] != "m2f":
            continue
        own = {
            "m2f.metrics.instance": {"pycocotools"},
            "m2f.fapn": {"torchvision"},
            "m2f.kernels.gpu": {"triton"},
        }  # Triton comes with torch
        own |= {f"m2f.kernels.triton_{kernel}": {"triton"} for kernel in ("attention", "labels", "masked_attention")}
        allowed = libraries | own.get(name, set())
        for other in imported(name):
            assert other.partition(".")[0] in allowed, f"{name} imports {other}"
        assert "torch.distributed" not in ast.unparse(ast.parse(path.read_text())), name


def test_only_one_module_spells_paths_of_results() -> None:
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                assert not re.search(r"results/[\w{]", node.value), (
                    f"{name} spells {node.value!r}: pipeline.storage.results does"
                )


def test_no_module_hides_its_imports() -> None:
    for name, path in modules().items():
        if name != "m2f":  # its lazy names are followed by tests.helpers.imports
            for node in ast.walk(ast.parse(path.read_text())):
                assert getattr(node, "attr", getattr(node, "id", "")) not in ("import_module", "__import__"), name


@pytest.mark.parametrize("stage", [*STAGES, "check", "reuse", "report", "plan", "storage", "track"])
def test_a_stages_help_loads_no_library(stage: str) -> None:
    heavy = ["torch", "ray", "mlflow", "pyarrow", "albumentations", "cv2", "numpy", "yaml"]
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{stage}', '--help']\n"
        f"try: runpy.run_module('stages.{stage}', run_name='__main__')\n"
        f"except SystemExit: pass\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith(f"usage: python -m stages.{stage}")
    assert answer.stdout.splitlines()[-1] == "[]"


def test_the_wrong_python_is_told_to_activate_the_environment() -> None:
    answer = subprocess.run(
        [sys.executable, "-S", "-E", "-m", "stages.fetch", "shapes"], cwd=PROJECT, capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert re.fullmatch(r"error: .* has no module yaml; activate the project's environment first .*\n", answer.stderr)


def test_no_file_names_a_machine_or_a_package_index() -> None:
    # Written so that this file does not match itself.
    folders = "|".join(("root", "work", "home", "opt", "Users"))
    machine = re.compile(rf"(?<![\w.~/*])/({folders})/|index[-_]url|pypi[.]org|pythonhosted[.]")
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = machine.search(text)
        assert found is None, f"{path.relative_to(PROJECT)}: {found.group(0) if found else ''}"


def test_the_lock_pins_every_requirement_exactly() -> None:
    lines = [line for line in (PROJECT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    pinned = {_canonical(line.partition("==")[0]) for line in lines}
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = [*project["optional-dependencies"]["s3"], *project["optional-dependencies"]["dev"]]
    wanted = {_canonical(re.split(r"[\[<>=]", name)[0]) for name in [*project["dependencies"], *extras]}
    assert wanted - {project["name"]} <= pinned  # the extra dev names the extra s3


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tracked() -> list[Path]:
    """Files of the project: what git tracks; in a copy without git, what it would."""
    answer = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if answer.returncode == 0 and answer.stdout:
        return [path for name in answer.stdout.split("\0") if name and (path := PROJECT / name).is_file()]
    tops = ("m2f", "pipeline", "stages", "tests", "docs", "benchmarks", "studies")
    return [path for top in tops for path in (PROJECT / top).rglob("*") if path.suffix in (".py", ".md", ".json")]


def test_no_file_is_a_symbolic_link() -> None:
    """Archives, copies and some file systems turn a link into a small file that holds its target's name."""
    assert [path for path in tracked() if path.is_symlink()] == []


# What DVC makes of it, in a copy of the project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Copy(tmp_path_factory.mktemp("made"))
    # DVC takes seconds for every row it looks at
    copy.keep_rows("shapes_tiny", "camvid_tiny", "ade20k_r50", "ade20k_swin-s", "cityscapes_r50", "cityscapes_r101")
    copy.make_everything_up_to_date()
    assert copy.stale() == set()
    return copy.folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Copy:
    """A copy in which everything is up to date."""
    shutil.copytree(made, tmp_path / "copy")
    copy = object.__new__(Copy)
    copy.folder = tmp_path / "copy"
    copy.params = read_settings(copy.folder / "params.yaml")
    return copy


@pytest.mark.slow
def test_every_row_and_dataset_is_a_stage(tmp_path: Path) -> None:
    copy = Copy(tmp_path)
    stages = {line.split()[0] for line in copy.dvc("stage", "list", "--name-only").splitlines()}
    expected = {f"{stage}@{name}" for stage, section in SECTIONS.items() for name in copy.params[section]}
    assert stages == expected | {"report"}


@pytest.mark.slow
def test_dvc_plots_show_draws_the_tables_that_have_lines(copy: Copy) -> None:
    results = copy.folder / "results"
    write_plot("classes", "camvid", [("sky", "train", 12, 3, 0)], results=results)
    write_plot("curves", "camvid_tiny", [("seed 0", "loss", 2, 5.5)], results=results)
    write_plot("confusion", "camvid_tiny", [("sky", "sky", 90.0)], results=results)
    shown = json.loads(copy.dvc("plots", "show", "--json"))["data"]
    drawn = {name: plots[0]["content"] for name, plots in shown.items() if plots}
    tables = {f"results/plots/{name}.csv" for name in ("classes/camvid", "curves/camvid_tiny", "confusion/camvid_tiny")}
    assert drawn.keys() == tables
    classes, confusion, curves = (drawn[name] for name in sorted(tables))
    assert curves["facet"]["field"] == "figure" and confusion["spec"]["encoding"]["y"]["field"] == "actual"
    assert classes["repeat"] == ["pixels", "images", "instances"]
    points = {"class": "sky", "split": "train", "pixels": "12", "images": "3", "instances": "0"}
    assert points.items() <= classes["data"]["values"][0].items()


def test_the_page_of_plots_loads_nothing_from_elsewhere(copy: Copy) -> None:
    write_plot("curves", "camvid_tiny", [("seed 0", "loss", 2, 5.5)], results=copy.folder / "results")
    copy.dvc("plots", "show", "--out", "shown")
    page = (copy.folder / "shown/index.html").read_text()
    assert '"training": "seed 0"' in page and "vegaEmbed('#results_plots_curves_camvid_tiny_csv'" in page
    assert re.findall(r"<(?:script|link)\b[^>]*\b(?:src|href)=", page) == []


@pytest.mark.slow
def test_a_changed_row_runs_again_alone(copy: Copy) -> None:
    copy.params["rows"]["shapes_tiny"]["train"]["optimizer"]["lr"] = 0.5
    copy.params["rows"]["ade20k_r50"]["test"] = {"short_side": 640}
    copy.params["rows"]["cityscapes_r101"]["published"]["miou"] = 99.0
    copy.params["verdict"]["margin_points"] = 2.0  # the report's alone
    copy.write_params()
    changed = ("shapes_tiny", "ade20k_r50", "cityscapes_r101")
    of_a_row = ("train", "evaluate", "benchmark", "register")
    expected = {f"{stage}@{row}" for stage in of_a_row for row in changed}
    expected |= {f"published@{name}" for name, entry in copy.params["checkpoints"].items() if entry["row"] in changed}
    assert copy.stale() == expected  # finished work of theirs is found again by its key


def test_a_changed_preset_runs_its_rows_again(copy: Copy) -> None:
    copy.params["presets"]["ade20k"]["train"]["steps"] = 100
    copy.write_params()
    rows = [name for name, row in copy.params["rows"].items() if row["preset"] == "ade20k"]
    assert rows and len(rows) < len(copy.params["rows"])
    stages = ("train", "evaluate", "benchmark", "register")  # published: by the digest in results/ready
    assert copy.stale() == {f"{stage}@{row}" for row in rows for stage in stages}


@pytest.mark.slow
def test_a_changed_dataset_runs_again_with_the_rows_on_it_only(copy: Copy) -> None:
    copy.params["datasets"]["shapes"]["generate"]["seed"] = 8
    copy.write_params()
    assert copy.stale() == {"shard@shapes"}
    manifest = copy.folder / "results" / "shard" / "camvid.json"
    manifest.write_text('"other pictures"')
    on_it = {f"{stage}@camvid_tiny" for stage in ("train", "evaluate", "benchmark", "register")}
    assert copy.stale() == {"shard@shapes", "shard@camvid", *on_it}


def test_a_new_row_adds_its_own_stages(copy: Copy) -> None:
    copy.params["rows"]["mine"] = {**copy.params["rows"]["camvid_tiny"], "seeds": [5]}
    copy.write_params()
    assert copy.stale() == {f"{stage}@mine" for stage in ("train", "evaluate", "benchmark", "register")}


@pytest.mark.slow
def test_a_changed_room_concerns_the_stages_that_use_it_only(copy: Copy) -> None:
    for room in ("report", "cluster"):
        with open(copy.folder / "pipeline" / room / "__init__.py", "a") as file:
            file.write("# changed\n")
    assert copy.stale() == set()
    with open(copy.folder / "pipeline" / "registry" / "register.py", "a") as file:
        file.write("# changed\n")
    assert copy.stale() == {f"register@{name}" for name in copy.params["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "git",
    [pytest.param(True, id="in a clone"), pytest.param(False, id="in a copy without git", marks=pytest.mark.full)],
)
def test_a_second_repro_runs_nothing_but_the_look_for_archives(tmp_path: Path, git: bool) -> None:
    copy = Copy(tmp_path)
    copy.keep_rows("shapes_tiny")  # DVC takes seconds for every row it reads
    copy.params["datasets"] = {"shapes": copy.params["datasets"]["shapes"]}
    copy.params["datasets"]["shapes"]["generate"] |= {"train": 2, "val": 1}
    copy.write_params()
    if git:
        (tmp_path / ".dvc/config.local").unlink()
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    assert "Running stage 'shard@shapes'" in copy.dvc("repro", "shard@shapes")
    again = copy.dvc("repro", "shard@shapes")
    assert re.findall(r"Running stage '(.*)'", again) == ["fetch@shapes"]
    assert not (tmp_path / ".dvc" / "cache").exists()
    # Settings that come back find no old result in a cache: the stage runs.
    for seed in (8, 7):
        copy.params["datasets"]["shapes"]["generate"]["seed"] = seed
        copy.write_params()
        assert "Running stage 'shard@shapes'" in copy.dvc("repro", "shard@shapes")

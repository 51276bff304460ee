"""Digests of definitions: what keeps them, and what changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest

from pipeline.provenance.code import Code, Written, code_digest
from pipeline.provenance.run_key import TRAINING
from pipeline.provenance.sources import PROJECT, Sources, source_file
from tests.helpers.mutations import OTHER, SAME, Change, Project

LOOP = """
from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from m2f.parts import SCALE, Box, area
from pipeline.storage.progress import Curve, Progress, text_of

if TYPE_CHECKING:
    from m2f.settings import Settings

log = logging.getLogger(__name__)


def train(settings: Settings, steps: int) -> float:
    \"\"\"Train.\"\"\"
    box = Box(side=settings.side)
    curve = Curve("file")
    total = 0.0
    for step in range(steps):
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        total += area(box.side) * SCALE
        box.grow(step)
        nn.init.zeros_(box)
        np.add.at(box, 0, torch.ones(1))
        watch(curve, step)
    return total


def watch(curve: Curve, step: int) -> None:
    curve.log(step)
"""

PARTS = """
from dataclasses import dataclass
from math import pi

SCALE = 2.0
\"\"\"What SCALE means.\"\"\"


@dataclass
class Box:
    \"\"\"A box.\"\"\"

    side: int = 3
    \"\"\"Its side.\"\"\"

    def grow(self, step: int) -> None:
        self.side += step


def area(radius: float) -> float:
    \"\"\"Area of a circle.\"\"\"
    return pi * radius**2  # a comment


def unused() -> int:
    return 1
"""

SETTINGS = """
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Settings:
    side: int = 3
    inner: Inner = field(default_factory=Inner)

    @property
    def twice(self) -> int:
        return 2 * self.side
"""

PROGRESS = """
class Progress:
    def add(self) -> None:
        print("one more")


class Curve:
    def __init__(self, path: str) -> None:
        self.path = path

    def log(self, step: int) -> None:
        print(step)


def text_of(step: int) -> str:
    return f"step {step}"
"""

FILES = {
    "m2f/__init__.py": "",
    "m2f/parts.py": PARTS,
    "m2f/settings.py": SETTINGS,
    "pipeline/__init__.py": "",
    "pipeline/loop.py": LOOP,
    "pipeline/storage/progress.py": PROGRESS,
}

CODE = Code(
    roots=("pipeline.loop.train",),
    sinks=("pipeline.storage.progress.Progress", "pipeline.storage.progress.Curve"),
    settings="m2f.settings.Settings",
)


@pytest.fixture
def digest(tmp_path: Path) -> Callable[..., str]:
    """The digest of the small project, with some texts replaced: file -> (old, new) pairs, or a whole file."""
    folders = iter(range(1000))

    def make(changes: Mapping[str, str | list[tuple[str, str]]] | None = None, code: Code = CODE) -> str:
        root = tmp_path / str(next(folders))
        texts = dict(FILES)
        for file, change in (changes or {}).items():
            if isinstance(change, str):
                texts[file] = change
                continue
            for old, new in change:
                assert old in texts[file], old
                texts[file] = texts[file].replace(old, new)
        for file, text in texts.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(text)
        return code_digest(code, root=root)

    return make


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("m2f/parts.py", "# a comment", "# another comment"),
        ("m2f/parts.py", "Area of a circle.", "The area, in squares of the radius's unit."),
        ("m2f/parts.py", '    """Area of a circle."""\n', ""),
        ("m2f/parts.py", '"""What SCALE means."""\n', ""),
        ("m2f/parts.py", "pi * radius**2", "(\n        pi\n        * radius ** 2\n    )"),
        ("m2f/parts.py", "SCALE = 2.0", "SCALE   =   2.00"),
        ("m2f/parts.py", "radius: float) -> float", "radius: int) -> object"),
        ("m2f/parts.py", "SCALE = 2.0", "SCALE: float = 2.0"),
        ("m2f/parts.py", "return 1", "return 2"),  # of a function that nothing uses
        ("pipeline/loop.py", "is below 0", "lies before the first; give 0 or more"),
        ("pipeline/loop.py", 'raise ValueError(f"step {step} is below 0")', "raise ValueError"),
        ("pipeline/loop.py", 'f"step {step} is below 0"', 'text_of(step) + " is below 0"'),
        ("pipeline/loop.py", "box.grow(step)", 'box.grow(step)\n        print(f"{step:>5} of {len(str(steps))}")'),
        ("pipeline/loop.py", "box.grow(step)", 'box.grow(step)\n        log.info("%s", text_of(step))'),
        ("pipeline/loop.py", "box.grow(step)", "box.grow(step)\n        Progress().add()"),
        (
            "pipeline/loop.py",
            "box.grow(step)",
            "box.grow(step)\n        if step % 10 == 0:\n            curve.log(step)",
        ),
        ("pipeline/loop.py", "    total = 0.0", "    progress = Progress()\n    total = 0.0\n    progress.add()"),
        ("pipeline/loop.py", "    curve.log(step)", "    curve.log(step + 1)"),
        ("pipeline/loop.py", "    curve.log(step)", "    with Progress() as progress:\n        progress.add()"),
        ("pipeline/loop.py", "import numpy as np", "import numpy"),
        ("pipeline/loop.py", "from torch import nn", "from torch import nn as layers"),
        ("pipeline/storage/progress.py", 'print("one more")', 'print("and one more")'),
        ("m2f/settings.py", "rate: float = 0.1", "rate: float = 0.2\n    more: int = 0"),
    ],
)
def test_what_computes_nothing_keeps_the_digest(digest: Callable[..., str], file: str, old: str, new: str) -> None:
    changes = [(old, new)]
    for name, other in (("numpy\n", "np."), ("as layers", "nn.")):  # the names are used as they are bound
        if new.endswith(name.strip()):
            changes += [(other, {"np.": "numpy.", "nn.": "layers."}[other])]
    assert digest({file: changes}) == digest()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("m2f/parts.py", "SCALE = 2.0", "SCALE = 2.5"),
        ("m2f/parts.py", "SCALE = 2.0", "SCALE = 2.0\nSCALE *= 2"),
        ("m2f/parts.py", "side: int = 3", "side: int = 4"),
        ("m2f/parts.py", "radius**2", "radius**3"),
        ("m2f/parts.py", "pi *", "pi +"),
        ("m2f/parts.py", "from math import pi", "from numpy import pi"),
        ("m2f/parts.py", "@dataclass\n", ""),
        ("m2f/parts.py", "self.side += step", "pass"),
        ("m2f/parts.py", "SCALE = 2.0", "SCALE = 2.0\nprint(SCALE)\nglobals().clear()"),
        ("pipeline/loop.py", "box.grow(step)", "pass"),
        ("pipeline/loop.py", "box.grow(step)", "box.grow(step + 1)"),
        (
            "pipeline/loop.py",
            "box.grow(step)\n        nn.init.zeros_(box)",
            "nn.init.zeros_(box)\n        box.grow(step)",
        ),
        ("pipeline/loop.py", "nn.init.zeros_(box)", "nn.init.ones_(box)"),
        ("pipeline/loop.py", "from torch import nn", "from other import nn"),
        ("pipeline/loop.py", "import torch\n", "import other as torch\n"),
        ("pipeline/loop.py", "import SCALE, Box, area", "import SCALE, Box, unused as area"),
        ("pipeline/loop.py", "raise ValueError", "raise KeyError"),
        ("pipeline/loop.py", "if step < 0", "if step < 1"),
        ("pipeline/loop.py", "watch(curve, step)", "print(box.grow(step))"),  # an argument that does work
        ("pipeline/loop.py", "curve.log(step)", "curve.log(torch.seed())"),
        ("pipeline/loop.py", "curve.log(step)", "curve.log(curve := step)"),
        ("pipeline/loop.py", "total = 0.0", "total = Progress().add()"),  # what a sink gives may be used
        ("pipeline/loop.py", "curve: Curve, step", "curve, step"),  # no sink that anybody could know of
        ("pipeline/loop.py", "log = logging", "torch.manual_seed(1)\nlog = logging"),
        ("pipeline/loop.py", "def watch", "torch.backends.cudnn.benchmark = True\n\n\ndef watch"),
        ("m2f/settings.py", "2 * self.side", "3 * self.side"),
    ],
)
def test_what_computes_changes_the_digest(digest: Callable[..., str], file: str, old: str, new: str) -> None:
    assert digest({file: [(old, new)]}) != digest()


def test_a_definition_may_be_renamed_and_moved_with_all_that_uses_it(digest: Callable[..., str]) -> None:
    area = PARTS[PARTS.index("def area") : PARTS.index("def unused")]
    size = area.replace("pi *", "half_turn *").replace("area", "size")
    moved = {
        "m2f/parts.py": [(area, ""), ("from math import pi\n", "")],
        "m2f/circles.py": f"from math import pi as half_turn\n\n\n{size}",
        "pipeline/loop.py": [
            ("import SCALE, Box, area", "import SCALE, Box\nfrom m2f import circles"),
            ("area(box.side)", "circles.size(box.side)"),
        ],
    }
    assert digest(moved) == digest()


def test_names_count_by_what_they_refer_to(digest: Callable[..., str]) -> None:
    # two modules with constants of one name, and a user of both: swapping the values, or the imports, is a change
    user = "from m2f.one import VALUE\nfrom m2f.two import VALUE as OTHER\n\n\ndef train():\n    return VALUE - OTHER\n"
    files = {"m2f/one.py": "VALUE = 1\n", "m2f/two.py": "VALUE = 2\n", "pipeline/user.py": user}
    code = Code(roots=("pipeline.user.train",))
    before = digest(files, code)
    assert digest({**files, "m2f/one.py": "VALUE = 2\n", "m2f/two.py": "VALUE = 1\n"}, code) != before
    assert digest({**files, "pipeline/user.py": user.replace("VALUE - OTHER", "OTHER - VALUE")}, code) != before
    crossed = {"m2f/one.py": "VALUE = 2\n", "m2f/two.py": "VALUE = 1\n"}
    back = user.replace("m2f.one", "m2f.three").replace("m2f.two", "m2f.one").replace("m2f.three", "m2f.two")
    assert digest({**crossed, "pipeline/user.py": back}, code) == before


def test_definitions_that_use_each_other_have_a_digest(digest: Callable[..., str]) -> None:
    even = "def even(n):\n    return n == 0 or odd(n - 1)\n\n\ndef odd(n):\n    return n != 0 and even(n - 1)\n"
    code = Code(roots=("pipeline.loop.even",))
    before = digest({"pipeline/loop.py": even}, code)
    assert digest({"pipeline/loop.py": even}, code) == before
    assert digest({"pipeline/loop.py": even.replace("odd(n - 1)", "even(n - 1)")}, code) != before


def test_what_is_left_out_counts_by_its_own_name_alone(digest: Callable[..., str]) -> None:
    code = Code(roots=CODE.roots, left_out={"m2f.parts.area": "watches"}, sinks=CODE.sinks, settings=CODE.settings)
    before = digest({}, code)
    assert digest({"m2f/parts.py": [("radius**2", "radius**3")]}, code) == before
    assert digest({"m2f/parts.py": [("SCALE = 2.0", "SCALE = 3.0")]}, code) != before
    renamed = {"m2f/parts.py": [("def area", "def size")], "pipeline/loop.py": [("area", "size")]}
    assert digest(renamed, dataclasses.replace(code, left_out={"m2f.parts.size": "watches"})) != before


def test_a_local_name_hides_the_modules(digest: Callable[..., str]) -> None:
    # `area` inside is a parameter: what m2f.parts calls so does not matter
    text = "from m2f.parts import area\n\n\ndef train(area):\n    return [area for area in area]\n"
    code = Code(roots=("pipeline.loop.train",))
    before = digest({"pipeline/loop.py": text}, code)
    assert digest({"pipeline/loop.py": text, "m2f/parts.py": [("radius**2", "radius**3")]}, code) == before


def test_a_name_that_nothing_binds_is_named(digest: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"pipeline\.loop uses the name 'absent', whose meaning cannot be followed"):
        digest({"pipeline/loop.py": [("total = 0.0", "total = absent")]})


def test_a_definition_that_is_not_there_is_named(digest: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match=r"pipeline\.loop has no absent"):
        digest({}, Code(roots=("pipeline.loop.absent",)))
    with pytest.raises(ValueError, match=r"pipeline\.loop is no function, class or constant"):
        digest({}, Code(roots=("pipeline.loop",)))


# The project's own source


@cache
def project() -> Project:
    return Project()


def test_every_entry_of_what_a_training_leaves_out_is_there() -> None:
    seen = Written.of(TRAINING).left_out
    assert set(TRAINING.left_out) - seen == set(), "nothing that shapes a training refers to these"
    sources = Sources(PROJECT)
    for sink in TRAINING.sinks:
        assert sources.module(sink) or sources.resolve(sink)  # a ValueError if there is none


def test_a_training_is_shaped_by_the_network_its_losses_the_draws_and_the_augmentation() -> None:
    modules = set(project().definitions)
    assert {
        "m2f.backbones.resnet", "m2f.backbones.swin", "m2f.deformable_attention", "m2f.draws", "m2f.layers",
        "m2f.losses", "m2f.matcher", "m2f.model", "m2f.optim", "m2f.pixel_decoder", "m2f.points", "m2f.query_decoder",
        "m2f.types", "m2f.weights.backbones", "pipeline.compute.precision", "pipeline.data.images.codecs",
        "pipeline.data.images.resize", "pipeline.data.loader.augmentation", "pipeline.data.loader.train_batches",
        "pipeline.runs.checkpoints", "pipeline.training.loop",
    } <= modules  # fmt: skip
    assert not {name for name in modules if name.startswith("m2f.metrics") or "inference" in name}


MODULES = sorted({each.module for each in Written.of(TRAINING).definitions})


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_changes_that_compute_the_same_keep_the_run_key_and_others_change_it(module: str) -> None:
    made = {make.__name__: make(project(), module) for make in (*SAME, *OTHER)}
    changes = {name: change for name, change in made.items() if change is not None}
    before = project().written.digest
    kept = {name for name, change in changes.items() if project().digest(change.texts, change.code) == before}
    assert kept == {make.__name__ for make in SAME} & set(changes)
    file = source_file(module)
    assert file is not None and file.is_relative_to(PROJECT)
    assert "other_comments" in changes and _has_enough(changes, module)


def _has_enough(changes: Mapping[str, Change], module: str) -> bool:
    """At least one change that computes something else; where there are fields alone, only methods count."""
    fields_alone = ("m2f.config", "pipeline.params.schema", "pipeline.runs.run")
    return bool({make.__name__ for make in OTHER} & set(changes)) or module in fields_alone


def test_two_streams_of_one_name_may_not_be_swapped() -> None:
    matcher, losses = (project().text(f"m2f.{name}") for name in ("matcher", "losses"))
    assert "_STREAM = 101" in matcher and "_STREAM = 102" in losses
    swapped = {
        "m2f.matcher": matcher.replace("_STREAM = 101", "_STREAM = 102"),
        "m2f.losses": losses.replace("_STREAM = 102", "_STREAM = 101"),
    }
    assert project().digest(swapped) != project().written.digest


def test_the_order_of_the_augmentations_draws_counts() -> None:
    text = project().text("pipeline.data.loader.augmentation")
    old = "brightness, contrast, saturation = draw.uniform(-32, 32), draw.uniform(0.5, 1.5), draw.uniform(0.5, 1.5)"
    new = "contrast, brightness, saturation = draw.uniform(0.5, 1.5), draw.uniform(-32, 32), draw.uniform(0.5, 1.5)"
    assert old in text
    assert project().digest({"pipeline.data.loader.augmentation": text.replace(old, new)}) != project().written.digest


def test_how_many_pictures_a_step_has_counts_although_its_settings_values_are_in_the_key() -> None:
    text = project().text("pipeline.params.schema")
    assert "self.groups * self.group_size" in text
    changed = text.replace("self.groups * self.group_size", "self.groups * self.group_size + 1")
    assert project().digest({"pipeline.params.schema": changed}) != project().written.digest
    more = text.replace("    steps: int\n", "    steps: int\n    more: int = 0\n", 1)
    assert project().digest({"pipeline.params.schema": more}) == project().written.digest

"""Look at a dataset: a page with its counts and its images, with labels, names and boxes.

The most crowded and the smallest images come first, then some of all, as shards hold them; then images as a row's
training sees them, after augmentation. With --worst, and a trained row, also the validation images on which the row
does worst by its task's figure, prediction beside truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stages import called, run

if TYPE_CHECKING:
    from pipeline.browse.page import Section
    from pipeline.params.schema import Params, Row, Task
    from pipeline.prediction.network import TrainedNetwork
    from pipeline.storage.results.data import Manifest


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("browse"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="an entry of `datasets` in params.yaml, sharded")
    parser.add_argument("--row", help="whose augmentation is shown (default: the dataset's first row)")
    parser.add_argument("--out", metavar="DIR", help="folder of the page (default: browse/<dataset>)")
    parser.add_argument("--split", default="train", help="of the stored images (default: %(default)s)")
    parser.add_argument("--count", type=int, default=12, help="images of each section (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the augmentation (default: %(default)s)")
    parser.add_argument("--worst", action="store_true", help="predict all validation images and show the worst")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()
    if arguments.count < 1:
        command_line().error("--count must be 1 or more")

    from pipeline.data.shards.look import current_manifest
    from pipeline.params.load import load_params

    params = load_params(arguments.params)
    row = _row(params, arguments.dataset, arguments.row)
    manifest = current_manifest(params, arguments.dataset)
    manifest.split(arguments.split)  # an error comes before the work
    if arguments.worst and row is None:
        raise ValueError(f"--worst needs a trained row, and params.yaml has none on dataset {arguments.dataset}")

    from pipeline.browse.page import open_page, write_page

    out = Path(arguments.out or f"browse/{arguments.dataset}")
    worst = _network(row, params) if arguments.worst and row is not None else None
    open_page(out)
    sections = _stored(out, manifest, row, arguments.split, arguments.count)
    if row is not None:
        sections.append(_augmented(out, manifest, row, seed=arguments.seed, count=arguments.count))
    if row is not None and worst is not None:
        sections.insert(0, _worst(out, manifest, row, worst, arguments.count))
    notes = [
        f"Colours are the classes'; things have boxes. Labels as the {arguments.split} split of the shards has them."
    ]
    write_page(out, manifest, sections, title=f"Dataset {arguments.dataset}", notes=notes)
    print(f"{out}/index.html shows dataset {arguments.dataset}")


def _row(params: Params, dataset: str, name: str | None) -> Row | None:
    """The row that is named, or the dataset's first; None: it has none."""
    params.dataset(dataset)
    if name is None:
        return next((params.row(each) for each, row in params.rows.items() if row.dataset == dataset), None)
    row = params.row(name)
    if row.dataset != dataset:
        raise ValueError(f"row {name} is of dataset {row.dataset}, not of {dataset}; name one of this dataset")
    return row


def _stored(out: Path, manifest: Manifest, row: Row | None, split: str, count: int) -> list[Section]:
    """The sections of stored pictures."""
    from pipeline.browse.page import Section, write_sample
    from pipeline.browse.samples import stored_samples

    task: Task = "semantic" if "semantic" in manifest.labels else "instance"
    samples = stored_samples(manifest, split, task=task, count=count)
    borders = "panoptic" in manifest.labels or task == "instance"
    texts = {
        "crowded": ("The most crowded", "Images with the most objects, as the shards hold them."),
        "smallest": ("The smallest", "Images of the fewest pixels."),
        "spread": ("From the whole split", "Images spread evenly over it."),
    }
    return [
        Section(
            title=title,
            text=text,
            cards=[
                write_sample(out, f"{name}-{place:03d}", sample, manifest.class_names, borders=borders)
                for place, sample in enumerate(getattr(samples, name))
            ],
        )
        for name, (title, text) in texts.items()
    ]


def _augmented(out: Path, manifest: Manifest, row: Row, *, seed: int, count: int) -> Section:
    """The section of pictures as a training sees them."""
    from pipeline.browse.page import Section, write_sample
    from pipeline.browse.samples import training_samples

    names = manifest.class_names_of(row.task)
    cards = [
        write_sample(out, f"training-{place:03d}", sample, names, borders=row.task != "semantic")
        for place, sample in enumerate(training_samples(manifest, row, seed=seed, count=count))
    ]
    crop = " × ".join(map(str, reversed(row.train.augmentation.crop)))
    text = (
        f"The first images of row {row.name} with seed {seed}, after augmentation: the smallest first, then the most "
        f"crowded. A smaller image than the crop, {crop}, is padded; the padding is not shown."
    )
    return Section(title="As a training sees them", text=text, cards=cards)


def _network(row: Row, params: Params) -> TrainedNetwork:
    from pipeline.prediction.network import device_named
    from pipeline.registry.source import open_source

    network = open_source(row.name, params=params)
    network.put_on(device_named(None))
    return network


def _worst(out: Path, manifest: Manifest, row: Row, network: TrainedNetwork, count: int) -> Section:
    """The section of the pictures on which the row does worst."""
    from pipeline.browse.page import IMAGES, Card, Section
    from pipeline.browse.worst import scored_images, write_worst
    from pipeline.params.tasks import LABELS, primary

    scored = scored_images(network.network, manifest, row)[:count]
    figure = LABELS[primary(row.task)]
    cards = [
        Card(
            file=f"{IMAGES}/{path.name}",
            title=each.name,
            note=f"{figure} {100 * each.value:.2f} on this image alone",
            classes={},
        )
        for each, path in write_worst(out / IMAGES, network.network, manifest, row, scored)
    ]
    text = f"Validation images with the lowest {figure}, by {network.description}: image, prediction, truth."
    return Section(title="Where the row does worst", text=text, cards=cards, wide=True)


if __name__ == "__main__":
    run(main)

"""Evaluate a row's published checkpoint with our own code: results/published/<row>.json."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.published", description=__doc__)
    parser.add_argument("row", help="an entry of `checkpoints` in params.yaml")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.files import write_json
    from pipeline.params import load_params, pick
    from pipeline.results import Manifest, read_result

    params = load_params(arguments.params)
    config = pick(params.checkpoints, arguments.row, "published checkpoint", arguments.params)
    row = params.row(arguments.row)
    manifest = read_result(Manifest, row.dataset)

    from pipeline.published import evaluate_published

    result = evaluate_published(row, config, manifest=manifest)
    write_json(f"results/published/{row.name}.json", result)
    print(f"{row.name}: the published checkpoint has {_compared(result, row.task)} here")
    if (other := result["other_padding"]) is not None:
        nearer = {1: "unpadded", 32: "padded", None: "neither"}[result["agrees"]]
        print(f"padded to a multiple of {other['pad_multiple']}: {_compared(other, row.task)}; nearer: {nearer}")


def _compared(result: Mapping[str, Any], task: str) -> str:
    """The published figures as we get them, and how far they are off."""
    from pipeline.tasks import LABELS, in_words

    if not result["difference"]:
        return in_words(result["figures"], task)
    return ", ".join(
        f"{LABELS[name]} {100 * result['figures'][name]:.2f} ({difference:+.2f} from the published figure)"
        for name, difference in result["difference"].items()
    )


if __name__ == "__main__":
    run(main)

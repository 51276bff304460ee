"""Get the weights a backbone starts from, in this network's names: results/weights/<name>.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from stages import asked_rows, run, targets


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.weights", description=__doc__)
    parser.add_argument("name", help="an entry of `weights` in params.yaml; none: nothing to get")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.params.load import load_params
    from pipeline.params.parse import pick
    from pipeline.storage.results import ConvertedWeights, write_result, write_waiting

    name, params = arguments.name, load_params(arguments.params)
    config = pick(params.weights, name, "weights entry", arguments.params)
    base = Path(arguments.params).absolute().parent
    if config.url and targets() == []:
        from pipeline.cost.needs import any_ready

        if not any_ready([row for row in params.rows.values() if row.weights == name], params, base=base):
            write_waiting(ConvertedWeights, name, f"a row with {name} that can be trained here")
            return
    if config.url:
        from pipeline.cost.needs import refuse_asked
        from pipeline.data.pretrained_weights import convert_weights

        refuse_asked(asked_rows(params), params, lambda row: row.weights == name, base=base)
        weights = convert_weights(name, config)
    else:
        weights = ConvertedWeights(name=name, url="", source_sha256=None, sha256=None, path=None)
    write_result(weights, name)
    print(f"{name}: {weights.path or 'random initial weights'}")


if __name__ == "__main__":
    run(main)

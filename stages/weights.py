"""Get the weights a backbone or a network starts from, in this network's names: results/weights/<name>.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from stages import asked_rows, called, run, targets


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(prog=called("weights"), description=__doc__)
    parser.add_argument("name", help="an entry of `weights` in params.yaml; none: nothing to get")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    from pipeline.params.load import load_params
    from pipeline.params.parse import pick
    from pipeline.storage.results.data import ConvertedWeights
    from pipeline.storage.results.folder import write_result, write_waiting
    from pipeline.storage.root import in_project

    name, params = arguments.name, load_params(arguments.params)
    config = pick(params.weights, name, "weights entry", arguments.params)
    base = in_project(Path(arguments.params).parent)
    source = config.url or config.path or config.row
    if source and targets() == []:
        from pipeline.cost.needs import any_ready

        if not any_ready([row for row in params.rows.values() if row.weights == name], params, base=base):
            write_waiting(ConvertedWeights, name, f"a row with {name} that can be trained here")
            return
    if source:
        from pipeline.cost.needs import refuse_asked
        from pipeline.data.pretrained_weights import convert_network, convert_weights

        refuse_asked(asked_rows(params), params, lambda row: row.weights == name, base=base)
        whole = config.layout == "mask2former"
        weights = convert_network(name, config, params) if whole else convert_weights(name, config)
    else:
        weights = ConvertedWeights(name=name, url="", source_sha256=None, sha256=None, path=None)
    write_result(weights, name)
    print(f"{name}: {weights.path or 'random initial weights'}")
    if weights.network:
        print(f"{name}: {weights.network}")


if __name__ == "__main__":
    run(main)

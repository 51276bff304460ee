"""Get the weights a backbone starts from, in this network's names: results/weights/<name>.json."""

from __future__ import annotations

import argparse

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m stages.weights", description=__doc__)
    parser.add_argument("name", help="an entry of `weights` in params.yaml; none: nothing to get")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    arguments = parser.parse_args()

    from pipeline.files import write_json
    from pipeline.params import load_params, pick

    name = arguments.name
    config = pick(load_params(arguments.params).weights, name, "weights entry", arguments.params)
    if config.url:
        from pipeline.initial_weights import convert_weights

        facts = convert_weights(name, config)
    else:
        facts = {"name": name, "path": None, "sha256": None}
    write_json(f"results/weights/{name}.json", facts)
    print(f"{name}: {facts['path'] or 'random initial weights'}")


if __name__ == "__main__":
    run(main)

"""What rows will cost: steps, GPU-hours, days on the GPUs at hand, storage and money, before they run.

How long a step takes comes from finished seeds of the row, else from benchmark@row on a GPU, else
from the log that published@row has fetched, else from the published inference speed of its network
on an A100: a training image then takes three times as long as a pass forward over as many pixels;
optimiser, matching and losses are not counted. That is right within a factor of about 2, which is
shown as a range.

GPU-hours count the GPUs that a training works on: as many as it has groups, if there are so many.
The time on the GPUs at hand is their GPU-hours divided by their number, but at least as long as the
longest row takes. Downloads, sharding and restarts come on top. Seeds that results/train holds as
finished are not counted again. docs/costs.md explains the tables.
"""

from __future__ import annotations

import argparse

from stages import called, run


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    parser = argparse.ArgumentParser(
        prog=called("plan"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="row",
        help="entries of `rows`; default: the published tables' rows, or else all",
    )
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument("--gpus", type=int, help="GPUs at hand; default: those of --cluster, else 8")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.9,
        help="share of perfect scaling that the GPUs of a training keep, where one device was measured or published; "
        "default: %(default)s",
    )
    parser.add_argument("--price-per-gpu-hour", type=float, help="an instance's price divided by its GPUs")
    parser.add_argument(
        "--cluster",
        metavar="FILE",
        help="take GPUs and price from a cluster file with provider.price_per_hour: of the dearest machine with GPUs",
    )
    parser.add_argument(
        "--spread",
        type=float,
        metavar="POINTS",
        help="standard deviation between seeds, for the chance to tell a difference; default: verdict in params.yaml",
    )
    parser.add_argument("--details", action="store_true", help="also steps, cost and evidence of every row")
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    return parser


def main() -> None:
    """Do what the command line says."""
    arguments = command_line().parse_args()

    import json

    from pipeline.cost.plan import Settings, make_plan
    from pipeline.cost.plan_table import text
    from pipeline.params.load import load_params
    from pipeline.storage.results.folder import RESULTS

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if arguments.cluster is not None:
        from pipeline.cluster.config import gpus_and_price

        gpus, price = gpus_and_price(arguments.cluster)
        given = {"gpus": gpus, "price_per_gpu_hour": price} | given
    settings = Settings(**{name: given[name] for name in Settings.__dataclass_fields__ if name in given})
    plan = make_plan(load_params(arguments.params), arguments.rows, settings, results=RESULTS)
    print(json.dumps(plan, indent=1) if arguments.json else text(plan, details=arguments.details))


if __name__ == "__main__":
    run(main)

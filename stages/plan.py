"""What rows will cost: steps, GPU-hours, wall time, storage and money, before they run.

How long a step takes comes from finished seeds of the row, else from benchmark@row on a GPU, else from the log that
published@row has fetched, else from the published inference speed of its network on an A100: a training picture then
takes three times as long as a pass forward over as many pixels; optimiser, matching and losses are not counted. That
is right within a factor of about 2, which is shown as a range.

When rows are done is simulated: every seed is a job for one whole pool of GPUs (two pools, for rows of 16 groups on
pools of 8), the longest job starts first, and a row is evaluated on a pool when its last seed has ended. Datasets that
have no shards yet are downloaded and sharded first, one after the other. GPU-hours and money count whole pools, as
long as they are occupied. Seeds that results/train holds as finished are not counted again.
"""

from __future__ import annotations

import argparse

from stages import run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="row", help="entries of `rows`; default: the published tables' rows")
    parser.add_argument("--params", default="params.yaml", help="default: %(default)s")
    parser.add_argument("--pools", type=int, default=1, help="groups of GPUs; default: %(default)s")
    parser.add_argument("--pool-gpus", type=int, default=8, help="GPUs of a pool; default: %(default)s")
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.9,
        help="share of perfect scaling that the GPUs of a training keep, where one device was measured or published; "
        "default: %(default)s",
    )
    parser.add_argument("--price-per-gpu-hour", type=float, help="of every GPU of an occupied pool")
    parser.add_argument("--price-per-pool-hour", type=float, help="of an occupied pool, say an instance of 8 GPUs")
    parser.add_argument(
        "--download-mib-s", type=float, default=50.0, help="of archives that are not there yet; default: %(default)s"
    )
    parser.add_argument("--cores", type=int, default=16, help="that make shards; default: %(default)s")
    parser.add_argument(
        "--preemption-hours",
        type=float,
        help="mean time until a pool is taken away (spot instances): steps since the last checkpoint are done again",
    )
    parser.add_argument(
        "--restart-minutes",
        type=float,
        default=10.0,
        help="until a preempted training runs again; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    arguments = parser.parse_args()

    import json

    from pipeline.cost.plan import Settings, make_plan
    from pipeline.cost.plan_table import text
    from pipeline.params.load import load_params
    from pipeline.storage.results import RESULTS

    given = vars(arguments)
    settings = Settings(**{name: given[name] for name in Settings.__dataclass_fields__})
    plan = make_plan(load_params(arguments.params), arguments.rows, settings, results=RESULTS)
    print(json.dumps(plan, indent=1) if arguments.json else text(plan))


if __name__ == "__main__":
    run(main)

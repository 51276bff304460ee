"""A published checkpoint and its training log, from a server to figures beside the published ones."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Literal

import pytest
import torch
from mlflow import MlflowClient

from m2f import build_model
from m2f.weights import reference_name, to_detectron2, to_huggingface
from pipeline.evaluation.published import digest_prefix, evaluate_published
from pipeline.evaluation.task_metrics import measure
from pipeline.params.schema import PublishedConfig, Row
from pipeline.runs.curve_file import read_curve
from pipeline.storage.files import sha256
from pipeline.storage.results.data import Manifest
from pipeline.tracking.mlflow_runs import track_published

LOG = [
    {"base_lr": 1e-4, "loss": 90.5, "decode.loss_cls": 4.0, "grad_norm": 200.0, "memory": 5806, "step": 50},
    {"base_lr": 5e-5, "loss": 60.0, "step": 100},
    {"aAcc": 91.0, "mIoU": 70.5, "mAcc": 80.0, "time": 0.1, "step": 100},
]


@pytest.fixture
def published(two_steps: Row, served: tuple[Path, str]) -> tuple[Row, PublishedConfig, torch.nn.Module]:
    """A checkpoint of the small row as mmsegmentation would publish it, and its log."""
    folder, url = served
    torch.manual_seed(4)
    model = build_model(two_steps.model)
    with torch.no_grad():
        decoder = model.query_decoder  # so that queries stand for different classes and parts of the picture
        for weight, factor in ((decoder.query_feature, 10), (decoder.class_head, 30), (decoder.mask_head[-1], 10)):
            weight.weight.mul_(factor)
    state = {reference_name(name): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {"iter": 2}}, folder / "new.pth")
    name = f"small-{sha256(folder / 'new.pth')[:8]}.pth"
    (folder / "new.pth").rename(folder / name)
    (folder / "small.json").write_text("".join(json.dumps(entry) + "\n" for entry in LOG))
    row = dataclasses.replace(two_steps, task="semantic", published={"miou": 12.5, "inf_fps": 9.0})
    return row, PublishedConfig(dataset="shapes", url=f"{url}/{name}", log_url=f"{url}/small.json"), model


def test_a_published_checkpoint_is_evaluated_like_our_own(
    published: tuple[Row, PublishedConfig, torch.nn.Module], small_data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    row, config, model = published
    result = evaluate_published(row, config, manifest=small_data[1])
    expected = measure(model, small_data[1], row).figures()["miou"]
    assert expected is not None and result.evaluated.checkpoint.figures["miou"] == expected
    assert result.evaluated.difference == {"miou": pytest.approx(100 * expected - 12.5)}
    assert result.evaluated.pad_multiple == 32 and result.other_padding is None and result.agrees is None
    curve = read_curve(tmp_path / "storage" / result.curve)
    assert [point["step"] for point in curve] == [50, 100]
    assert curve[1]["val_miou"] == pytest.approx(0.705) and curve[1]["loss"] == 60.0
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert result.mlflow_run_id is None  # a stage writes its result first
    run = client.get_run(track_published(row, config, result))
    assert run.info.run_name == "published small" and run.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "train/loss")] == [90.5, 60.0]
    again = evaluate_published(row, config, manifest=small_data[1])
    assert again == result and track_published(row, config, again) == run.info.run_id
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2


def test_an_unpadded_row_is_also_evaluated_padded_and_says_which_is_nearer(
    published: tuple[Row, PublishedConfig, torch.nn.Module], small_data: tuple[Path, Manifest]
) -> None:
    row, config, model = published
    # 64 x 96 pictures at 40 x 60: padded to 64 x 64, or not at all
    figures = {}
    for multiple in (1, 32):
        test = dataclasses.replace(row.test, short_side=40, long_side_max=80, pad_multiple=multiple)
        figures[multiple] = measure(model, small_data[1], dataclasses.replace(row, test=test)).figures()["miou"]
    assert figures[1] is not None and figures[32] is not None and figures[1] != figures[32]
    test = dataclasses.replace(row.test, short_side=40, long_side_max=80, pad_multiple=1)
    for nearer in (1, 32):
        unpadded = dataclasses.replace(row, test=test, published={"miou": 100 * figures[nearer]})
        result = evaluate_published(unpadded, config, manifest=small_data[1])
        assert result.evaluated.pad_multiple == 1
        assert result.evaluated.checkpoint.figures["miou"] == figures[1]
        assert result.other_padding is not None and result.other_padding.pad_multiple == 32
        assert result.other_padding.checkpoint.figures["miou"] == figures[32]
        assert result.agrees == nearer


@pytest.mark.parametrize("layout", ["detectron2", "huggingface"])
def test_the_same_network_under_other_names_scores_the_same_and_is_judged_by_the_authors_figure(
    published: tuple[Row, PublishedConfig, torch.nn.Module],
    small_data: tuple[Path, Manifest],
    served: tuple[Path, str],
    layout: Literal["detectron2", "huggingface"],
) -> None:
    row, config, model = published
    to_theirs = {"detectron2": to_detectron2, "huggingface": to_huggingface}[layout]
    state = to_theirs(model.state_dict(), row.model)
    (served[0] / "model.pkl").write_bytes(
        pickle.dumps({"model": {name: value.numpy() for name, value in state.items()}, "__author__": "x"})
    )
    row = dataclasses.replace(row, published_authors={"miou": 20.0, "miou_ms_flip": 30.0})
    other = PublishedConfig(
        row=row.name,
        dataset="shapes",
        url=f"{served[1]}/model.pkl",
        layout=layout,
        figures="published_authors",
    )
    result = evaluate_published(row, other, manifest=small_data[1], name="small_authors")
    expected = evaluate_published(row, config, manifest=small_data[1]).evaluated.checkpoint.figures["miou"]
    assert expected is not None and result.evaluated.checkpoint.figures["miou"] == expected
    assert result.evaluated.difference == {"miou": pytest.approx(100 * expected - 20.0)}
    assert (result.row, result.name, result.published) == (row.name, "small_authors", row.published_authors)
    assert result.curve is None and track_published(row, other, result) is None


def test_a_checkpoint_of_another_network_is_refused(
    published: tuple[Row, PublishedConfig, torch.nn.Module], small_data: tuple[Path, Manifest]
) -> None:
    row, config, _ = published
    more_queries = dataclasses.replace(row.model.query_decoder, queries=20)
    other = dataclasses.replace(row, model=dataclasses.replace(row.model, query_decoder=more_queries))
    with pytest.raises(
        ValueError, match=r"does not fit this model: 2 of another shape \(decode_head.query_feat.weight"
    ):
        evaluate_published(other, config, manifest=small_data[1])


def test_a_checkpoint_that_was_altered_on_its_way_is_refused(
    published: tuple[Row, PublishedConfig, torch.nn.Module],
    small_data: tuple[Path, Manifest],
    served: tuple[Path, str],
) -> None:
    row, config, _ = published
    path = served[0] / config.url.rpartition("/")[2]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"small-\w+.pth has sha256 .* it is truncated or altered"):
        evaluate_published(row, config, manifest=small_data[1])


def test_the_digest_is_read_from_a_published_name() -> None:
    assert digest_prefix("https://x/mask2former_r50_20221202_140802-ffd9d750.pth") == "ffd9d750"
    assert digest_prefix("https://x/swin_tiny_patch4_window7_224.pth") == ""

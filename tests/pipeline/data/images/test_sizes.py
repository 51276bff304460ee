from __future__ import annotations

from pipeline.data.images.sizes import counted, input_size, ms_flip_factor
from pipeline.params.schema import Params
from tests.helpers.costs import manifest


def test_a_picture_is_shown_at_the_rows_short_side_and_padded(params: Params) -> None:
    # 512 x 683 stays as it is: 512 x 704. 480 x 640: short side 800, so 800 x 1066.7 -> 1067, padded to 1088; the
    # 640 x 640 rows are not padded: 640 x 853.75 -> 854.
    assert input_size((512, 683), params.rows["ade20k_r50"].test) == (512, 704)
    assert input_size((480, 640), params.rows["coco_panoptic_r50"].test) == (800, 1088)
    assert input_size((512, 683), params.rows["ade20k_swin-b"].test) == (640, 854)
    # 400 x 1600: the long side stops at 1333, 333.25 x 1333 -> 333 x 1333 -> 352 x 1344
    assert input_size((400, 1600), params.rows["coco_panoptic_r50"].test) == (352, 1344)


def test_ms_flip_costs_as_many_pictures_as_its_views_have_pixels(params: Params) -> None:
    # Cityscapes: six sizes of 0.5 to 1.75, each also mirrored: 2 * (0.25 + 0.5625 + 1 + 1.5625 + 2.25 + 3.0625)
    assert ms_flip_factor((1024, 2048), params.rows["cityscapes_r50"].test) == 17.375
    assert ms_flip_factor((480, 640), params.rows["coco_panoptic_r50"].test) == 0


def test_pictures_are_counted_by_shards_where_there_are_some() -> None:
    published = counted("ade20k", None)
    assert published is not None and (published.train, published.val) == (20210, 2000)
    made = counted("ade20k", manifest(train=7, val=3))
    assert made is not None and (made.train, made.val, made.usual) == (7, 3, (128, 192))
    assert counted("mine", None) is None

"""Overlays for the page: their three panels as small JPEGs inside it, within a limit for the whole page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE_MIB = 8.0
"""Most that all pictures of a page take together."""
ROW_OVERLAYS = 3
"""Overlays that are shown of a row; the run folder has the others."""
PANEL_KIB = 60.0
"""Most that one panel takes, where a page holds few."""
PANEL_WIDTH = 560
"""Pixels across; about twice what a page shows of them."""

_GAP = 4
"""White pixels between the panels that pipeline.evaluation.overlays.write_overlay puts side by side."""


def panel_limit(panels: int) -> int:
    """Bytes that each of a page's panels may take."""
    return int(1024 * min(PANEL_KIB, 1024 * PAGE_MIB / max(panels, 1)))


def panels(overlay: bytes, limit: int) -> list[str]:
    """The picture, the prediction and the truth of an overlay, each as a data URI of at most `limit` bytes of JPEG.

    ValueError when it is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(overlay)) as opened:
            sheet = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"it is no image: {error}") from None
    width, rest = divmod(sheet.width - 2 * _GAP, 3)
    if rest or width < 1:
        return [_data_uri(sheet, limit)]
    return [
        _data_uri(sheet.crop((left, 0, left + width, sheet.height)), limit)
        for left in (i * (width + _GAP) for i in range(3))
    ]


def _data_uri(picture: Any, limit: int) -> str:
    width = min(PANEL_WIDTH, picture.width)
    while True:
        data = _jpeg(picture, width)
        if len(data) <= limit or width <= 32:
            return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        width = int(width * 0.8)


def _jpeg(picture: Image, width: int) -> bytes:
    buffer = io.BytesIO()
    height = max(1, round(picture.height * width / picture.width))
    shown = picture if width == picture.width else picture.resize((width, height), reducing_gap=3.0)
    shown.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()

"""The folder that predictions are written to, which knows what in it is whole.

labels/<name>.png       class ids, with --palette in the classes' colours
overlays/<name>.jpg     the picture with its objects painted over it and named
panoptic/<name>.png     panoptic rows: COCO's segment ids, red + 256 green + 65536 blue
predictions.json, summary.csv, index.html   written last, of all pictures

.predict/settings.json says what the predictions are of; .predict/done/<name>.json is a picture's entry, written when
its other files are whole. So the same command goes on where it was interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.images.codecs import encode_segments, nothing_for
from pipeline.data.images.draw import class_colours
from pipeline.params.parse import parse
from pipeline.prediction.annotations import Annotated
from pipeline.prediction.drawing import overlay
from pipeline.storage.files import files_below, read_json, whole_file, write_json

if TYPE_CHECKING:
    from pipeline.prediction.images import Picture

_STATE = ".predict"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A picture that is predicted, and what was found in it."""

    name: str
    """Of its files."""
    file: str
    digest: str
    height: int
    width: int
    classes: Mapping[str, int]
    """Objects of every class that is there; of a class without objects, 1."""
    annotations: tuple[Mapping[str, Any], ...]
    """COCO's, without the picture's number."""


@dataclass(frozen=True)
class Folder:
    """An opened output folder. Can be sent to another process."""

    path: Path
    class_names: tuple[str, ...]
    task: str
    palette: bool
    """Whether label maps are in the classes' colours."""

    def entry(self, name: str) -> Entry | None:
        """A finished picture's; None: it is not finished, or a file of it is gone."""
        try:
            found = parse(Entry, read_json(self._entry_file(name), made_by=""), name, in_file=True)
        except ValueError:
            return None
        return found if all(file.exists() for file in self._files(name)) else None

    def is_done(self, name: str, digest: str) -> bool:
        """Whether a picture of this name and digest is finished."""
        found = self.entry(name)
        return found is not None and found.digest == digest

    def add(self, picture: Picture, found: Annotated) -> None:
        """Write all files of a picture, its entry last."""
        assert picture.pixels is not None
        counts: dict[str, int] = {}
        for label in found.objects.labels:
            counts[self.class_names[label]] = counts.get(self.class_names[label], 0) + 1
        with _writable(self.path):
            _write(self.labels_file(picture.name), self._label_png(found.label_map))
            if found.segment_ids is not None:
                _write(self.panoptic_file(picture.name), _coloured_ids(found.segment_ids))
            shown = overlay(picture.pixels, found.objects, self.class_names, borders=self.task != "semantic")
            _write(self.overlay_file(picture.name), _jpeg(shown))
            entry = Entry(
                name=picture.name,
                file=picture.file,
                digest=picture.digest,
                height=picture.pixels.shape[0],
                width=picture.pixels.shape[1],
                classes=counts,
                annotations=tuple(found.annotations),
            )
            write_json(self._entry_file(picture.name), asdict(entry))

    def entries(self, names: list[str]) -> Iterator[Entry]:
        """The finished pictures of these names, in their order."""
        return (entry for name in names if (entry := self.entry(name)) is not None)

    def discard(self) -> None:
        """Delete a folder that no picture was written to."""
        if not self.finished():
            shutil.rmtree(self.path / _STATE)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def finished(self) -> int:
        """How many pictures are finished, those of an earlier run included."""
        return sum(name.endswith(".json") for name in files_below(self.path / _STATE / "done"))

    def forget_others(self, names: list[str]) -> None:
        """Delete the files of pictures that are not among `names`: of files that were renamed or deleted meanwhile."""
        done, kept = self.path / _STATE / "done", set(names)
        for file in done.rglob("*.json") if done.exists() else ():
            name = file.relative_to(done).as_posix().removesuffix(".json")
            if name not in kept:
                for each in (file, *self._files(name)):
                    each.unlink(missing_ok=True)

    def labels_file(self, name: str) -> Path:
        """A picture's label map."""
        return self.path / "labels" / f"{name}.png"

    def overlay_file(self, name: str) -> Path:
        """A picture with its objects."""
        return self.path / "overlays" / f"{name}.jpg"

    def panoptic_file(self, name: str) -> Path:
        """A picture's segment ids."""
        return self.path / "panoptic" / f"{name}.png"

    def _entry_file(self, name: str) -> Path:
        return self.path / _STATE / "done" / f"{name}.json"

    def _files(self, name: str) -> list[Path]:
        files = [self.labels_file(name), self.overlay_file(name)]
        return [*files, self.panoptic_file(name)] if self.task == "panoptic" else files

    def _label_png(self, label_map: np.ndarray) -> bytes:
        """Ids or, with a palette, their colours: an indexed PNG, whose indices are the ids, of up to 255 classes."""
        if not self.palette:
            return encode_segments(label_map)
        import io

        from PIL import Image

        colours = class_colours(len(self.class_names))
        if label_map.dtype == np.uint8:
            indexed = Image.fromarray(label_map, "P")
            indexed.putpalette(np.concatenate([colours, np.zeros((256 - len(colours), 3), np.uint8)]).tobytes())
        else:
            every = np.concatenate([colours, np.zeros((1, 3), np.uint8)])
            indexed = Image.fromarray(every[np.where(label_map == nothing_for(len(colours)), len(colours), label_map)])
        data = io.BytesIO()
        indexed.save(data, "PNG", compress_level=1)
        return data.getvalue()


def open_folder(
    path: Path, settings: Mapping[str, Any], *, class_names: tuple[str, ...], task: str, palette: bool
) -> Folder:
    """Make the folder, or go on in one of the same settings.

    ValueError where it holds other files or other settings' predictions, or cannot be written.
    """
    state = path / _STATE / "settings.json"
    wanted = {**settings, "palette": palette}
    with _writable(path):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file; give a folder with --out")
        if path.exists() and any(path.iterdir()) and not state.exists():
            raise ValueError(f"{path} holds other files than predictions; give an empty or a new folder with --out")
        if state.exists():
            made = read_json(state, made_by="the same command with a new --out")
            differing = sorted(key for key in {*made, *wanted} if made.get(key) != wanted.get(key))
            if differing:
                raise ValueError(
                    f"{path} holds predictions with other settings ({', '.join(differing)}); give another folder with "
                    "--out, or delete it"
                )
        else:
            write_json(state, wanted)
        shutil.rmtree(path / _STATE / "tried", ignore_errors=True)
        (path / _STATE / "tried").mkdir()  # whether one may write there is known before the first picture
        (path / _STATE / "tried").rmdir()
    return Folder(path, class_names, task, palette)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """ValueError where the system refuses to write there."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileNotFoundError) as error:
        raise ValueError(f"{error.filename or path} cannot be written ({error.strerror}); give a folder with --out "
                         "that this user may write to") from None  # fmt: skip


def _write(path: Path, data: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(data)


def _coloured_ids(ids: np.ndarray) -> bytes:
    """COCO's panoptic PNG of segment ids."""
    import cv2

    blue_green_red = np.empty((*ids.shape, 3), np.uint8)
    for channel, factor in enumerate((65536, 256, 1)):
        blue_green_red[..., channel] = ids // factor % 256
    done, data = cv2.imencode(".png", blue_green_red, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done
    return bytes(data.tobytes())


def _jpeg(image: np.ndarray) -> bytes:
    import cv2

    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done
    return bytes(data.tobytes())

"""Pictures are found wherever they are named, and no two get one name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.data.images.image_files import AS_FILES_SAY
from pipeline.prediction.images import Found, find_images, read_images
from pipeline.prediction.video import write_video
from tests.helpers.images import encoded, image, put, zipped

NOWHERE = Path("/nowhere")


def found_names(source: Path | str, without: Path = NOWHERE) -> list[str]:
    return [each.name for each in find_images(str(source), without=without)]


def test_a_folder_is_searched_with_its_folders_and_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("b.jpg", "deep/er/a.png", "notes.txt", ".hidden.png"):
        put(tmp_path / name, encoded(image()))
    assert found_names(tmp_path) == ["b", "deep/er/a"]


def test_pictures_whose_names_differ_in_the_suffix_alone_keep_it(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "a.jpg.png", "sub/a.png"):
        put(tmp_path / name, encoded(image()))
    # a.jpg.png without its suffix is a.jpg, which the first is called by then
    assert found_names(tmp_path) == ["a.jpg", "a.jpg.png", "a.png", "sub/a"]


def test_frames_of_a_video_and_pictures_in_a_folder_of_its_name_stay_apart(tmp_path: Path) -> None:
    for name in ("v.mp4", "w.mp4", "v/000001.png"):
        put(tmp_path / name, b"")
    assert found_names(tmp_path) == ["v.mp4", "v/000001", "w"]


def test_a_video_whose_name_a_mac_has_decomposed_is_found_again(tmp_path: Path) -> None:
    there = tmp_path / "vide\u0301o.mp4"
    write_video(there, [image(64, 96)], rate=5)
    (found,) = find_images(str(tmp_path), without=NOWHERE)
    assert (found.name, found.path) == ("vid\u00e9o", there)
    assert [each.name for each in read_images([found], AS_FILES_SAY, is_done=lambda *_: False)] == ["vid\u00e9o/000001"]


def test_a_zip_a_glob_and_a_single_file_are_searched_too(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/y/b.png"):
        put(tmp_path / "in" / name, encoded(image()))
    assert found_names(zipped(tmp_path / "in", tmp_path / "in.zip")) == ["x/a", "x/y/b"]
    assert found_names(f"{tmp_path}/in/**/*.png") == ["a", "y/b"]  # below the folder that they share
    assert found_names(tmp_path / "in/x/a.png") == ["a"]


def test_an_archive_cannot_name_what_is_written_outside(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in ("../../up.png", "a/../../up.png", "/etc/down.png"):
            archive.writestr(name, encoded(image()))
    assert found_names(tmp_path / "evil.zip") == ["etc/down"]  # what begins with a dot is hidden


def test_the_output_folder_is_no_input(tmp_path: Path) -> None:
    for name in ("a.png", "out/labels/a.png"):
        put(tmp_path / name, encoded(image()))
    assert found_names(tmp_path, without=tmp_path / "out") == ["a"]


def test_the_output_folder_is_no_input_whatever_link_leads_there(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/out/labels/a.png"):
        put(tmp_path / name, encoded(image()))
    (tmp_path / "link").symlink_to("in")
    assert found_names(tmp_path / "in", without=tmp_path / "link/out") == ["a"]
    assert found_names(tmp_path / "link", without=tmp_path / "in/out") == ["a"]
    for without in ("in", "link", ".", "in/out/.."):
        with pytest.raises(ValueError, match=r"in lies in .*, where the results would go; give another folder with"):
            found_names(tmp_path / "in", without=tmp_path / without)


def test_a_name_that_is_too_long_for_what_is_added_to_it_is_left_out_with_the_reason(tmp_path: Path) -> None:
    for name in ("a" * 200, "b" * 201, "ü" * 101):
        put(tmp_path / f"{name}.png", encoded(image()))
    put(tmp_path / f"{'v' * 201}.mp4", b"")
    pictures = read_images(find_images(str(tmp_path), without=NOWHERE), AS_FILES_SAY, is_done=lambda *_: False)
    wrong = [each.error.rpartition("' ")[2] for each in pictures]
    assert wrong == [
        "",
        "has a name of 201 bytes; rename it to 200 or less",
        "has a name of 201 bytes; rename it to 200 or less",
        "has a name of 202 bytes; rename it to 200 or less",  # two bytes each in UTF-8
    ]


def test_a_compressed_tar_archive_and_an_empty_name_are_refused_in_a_sentence(tmp_path: Path) -> None:
    put(tmp_path / "a.tar.gz", b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is a compressed tar archive.*; unpack it first"):
        found_names(tmp_path / "a.tar.gz")
    with pytest.raises(ValueError, match="IMAGES is empty; name an image"):
        found_names("")


def test_where_there_is_no_picture_a_sentence_says_so(tmp_path: Path) -> None:
    put(tmp_path / "notes.txt", b"")
    with pytest.raises(ValueError, match=r"holds no image: no file in it ends with one of \.jpg"):
        found_names(tmp_path)
    with pytest.raises(ValueError, match=r"gone\.png is no file or folder, and no file matches it"):
        found_names(tmp_path / "gone.png")


def test_a_picture_that_does_not_decode_is_given_with_the_reason(tmp_path: Path) -> None:
    pixels = image()
    put(tmp_path / "a.png", encoded(pixels))
    put(tmp_path / "b.png", b"no picture")
    first, second = read_images(find_images(str(tmp_path), without=NOWHERE), AS_FILES_SAY, is_done=lambda *_: False)
    assert first.pixels is not None and np.array_equal(first.pixels, pixels) and not first.error
    assert second.pixels is None and second.error.startswith("b.png does not decode")


def test_alpha_sixteen_bits_and_exif_are_read_as_for_a_training(tmp_path: Path) -> None:
    from PIL import Image

    grey = np.full((4, 6), 0xAB12, np.uint16)
    put(tmp_path / "deep.png", encoded(grey))
    alpha = np.dstack([np.full((4, 6, 3), 9, np.uint8), np.zeros((4, 6), np.uint8)])
    put(tmp_path / "alpha.png", bytes(cv2.imencode(".png", alpha)[1].tobytes()))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    found = find_images(str(tmp_path), without=NOWHERE)
    read = {each.name: each.pixels for each in read_images(found, AS_FILES_SAY, is_done=lambda *_: False)}
    assert (read["deep"] == 0xAB).all() and read["deep"].shape == (4, 6, 3)  # the upper byte
    assert (read["alpha"] == 9).all() and read["alpha"].shape == (4, 6, 3)
    assert read["turned"].shape == (6, 4, 3)


def test_what_is_finished_is_not_decoded_again(tmp_path: Path) -> None:
    put(tmp_path / "a.png", encoded(image()))
    (picture,) = read_images([Found("a", tmp_path, "a.png")], AS_FILES_SAY, is_done=lambda name, _: name == "a")
    assert picture.pixels is None and not picture.error and len(picture.digest) == 64


def test_a_picture_that_is_gone_meanwhile_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path / name, encoded(image()))
    found = find_images(str(tmp_path), without=NOWHERE)
    (tmp_path / "a.png").unlink()
    first, second = read_images(found, AS_FILES_SAY, is_done=lambda *_: False)
    assert "a.png cannot be read ([Errno 2] No such file or directory" in first.error
    assert second.pixels is not None

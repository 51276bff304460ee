"""Where the compiled loops come from, and what happens without a compiler."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from m2f.kernels import build
from m2f.kernels.build import loops

SHOWN = """
from m2f.kernels.build import use
print(use({!r}))
"""


def run(code: str, *, path: str | None = None, cache: Path) -> subprocess.CompletedProcess[str]:
    """A fresh Python, with this PATH and cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HOME": str(cache)}
    if path is not None:
        environment["PATH"] = path
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


def compiler_that(does: str, folder: Path) -> str:
    """A folder, for PATH, with a `cc` that is this shell script."""
    folder.mkdir()
    script = folder / "cc"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.defpath}"


def test_without_a_compiler_auto_is_plain_and_says_so_in_one_line(tmp_path: Path) -> None:
    done = run(SHOWN.format("auto"), path=str(tmp_path / "nothing"), cache=tmp_path)
    assert done.stdout == "plain\n"
    assert done.stderr == (
        "there is no C compiler (cc, gcc, clang): PyTorch's own operations are used, which are slower\n"
    )


def test_plain_asks_for_no_compiler(tmp_path: Path) -> None:
    done = run(SHOWN.format("plain"), path=str(tmp_path / "nothing"), cache=tmp_path)
    assert (done.stdout, done.stderr) == ("plain\n", "")


def test_compiled_without_a_compiler_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    done = run(SHOWN.format("compiled"), path=str(tmp_path / "nothing"), cache=tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: kernels is compiled, but there is no C compiler (cc, gcc, clang); install a C "
        "compiler, or set it to plain"
    )


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    path = compiler_that('[ "$1" = --version ] && exit 0; echo "cpu.c:1: unknown word" >&2; exit 1', tmp_path / "bin")
    done = run(SHOWN.format("auto"), path=path, cache=tmp_path / "cache")
    assert done.stdout == "plain\n"
    assert "cc cannot compile cpu.c (cpu.c:1: unknown word): PyTorch's own operations are used" in done.stderr
    assert list((tmp_path / "cache" / "m2f-kernels").iterdir()) == []


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
def test_the_library_is_made_once_and_found_again(tmp_path: Path) -> None:
    assert run(SHOWN.format("compiled"), cache=tmp_path).stdout == "compiled\n"
    (made,) = (tmp_path / "m2f-kernels").iterdir()
    before = made.stat().st_mtime_ns
    assert run(SHOWN.format("compiled"), cache=tmp_path).stdout == "compiled\n"
    assert [path.stat().st_mtime_ns for path in (tmp_path / "m2f-kernels").iterdir()] == [before]


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
def test_a_library_that_counts_wrong_is_not_used(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text(build._SOURCE.read_text().replace("- 0.5f", "- 0.25f"))
    code = f"from pathlib import Path\nfrom m2f.kernels import build\nbuild._SOURCE = Path({str(source)!r})\n"
    done = run(code + SHOWN.format("auto"), cache=tmp_path)
    assert done.stdout == "plain\n"
    assert "made something of wrong.c that counts wrong" in done.stderr


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
@pytest.mark.parametrize("share_left", [0, 0.25, 0.5, 0.99])
def test_a_library_that_was_cut_short_is_made_again(share_left: float, tmp_path: Path) -> None:
    run(SHOWN.format("compiled"), cache=tmp_path)
    (made,) = (tmp_path / "m2f-kernels").iterdir()
    whole = made.read_bytes()
    made.write_bytes(whole[: int(share_left * len(whole))])  # loaded, a quarter or a half ends the process
    done = run(SHOWN.format("compiled"), cache=tmp_path)
    assert (done.stdout, done.stderr) == ("compiled\n", "")
    assert made.read_bytes() == whole


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
def test_two_processes_that_make_the_library_at_once_both_have_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as several:
        done = list(several.map(lambda _: run(SHOWN.format("compiled"), cache=tmp_path), range(3)))
    assert [each.stdout for each in done] == ["compiled\n"] * 3
    assert len(list((tmp_path / "m2f-kernels").iterdir())) == 1


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
def test_nothing_is_loaded_from_a_folder_that_others_write_to_and_nothing_is_left_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m2f-kernels").mkdir()
    (tmp_path / "m2f-kernels").chmod(0o777)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    assert run(SHOWN.format("compiled"), cache=tmp_path).stdout == "compiled\n"
    assert not any(list((tmp_path / folder).iterdir()) for folder in ("m2f-kernels", "temporary"))


def test_a_compiler_that_hangs_is_given_up_and_quoted(tmp_path: Path) -> None:
    path = compiler_that(r'[ "$1" = --version ] && exit 0; printf "waits \\351\n" >&2; exec sleep 60', tmp_path / "bin")
    code = "from m2f.kernels import build\nbuild._COMPILE_S = 1.0\n"
    done = run(code + SHOWN.format("auto"), path=path, cache=tmp_path)
    assert done.stdout == "plain\n"
    assert "cc cannot compile cpu.c (waits \ufffd): PyTorch's own operations" in done.stderr


@pytest.mark.parametrize("does", [r'printf "\351\n" >&2; exit 1', "exit 1", "kill -9 $$"])
def test_a_compiler_that_fails_at_once_in_any_words_is_done_without(does: str, tmp_path: Path) -> None:
    done = run(SHOWN.format("auto"), path=compiler_that(does, tmp_path / "bin"), cache=tmp_path)
    assert done.stdout == "plain\n"
    assert len(done.stderr.splitlines()) == 1 and "cc cannot compile cpu.c (" in done.stderr


def test_a_compiler_is_asked_once_by_a_process(tmp_path: Path) -> None:
    path = compiler_that(f"echo asked >> {tmp_path}/asked; exit 1", tmp_path / "bin")
    code = "from m2f.kernels.build import use\nuse('auto')\ntry: use('compiled')\nexcept ValueError: print('refused')"
    assert run(code, path=path, cache=tmp_path).stdout == "refused\n"
    assert (tmp_path / "asked").read_text() == "asked\n"


@pytest.mark.skipif(loops() is None, reason="needs a C compiler")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "m2f-kernels").write_text("in the way")
    assert run(SHOWN.format("compiled"), cache=tmp_path).stdout == "compiled\n"

"""Building the package: the files of this repository that `m2f init` begins a project with go along."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FILES = ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/plots/*")
"""Copied into pipeline/project/repository/, where pipeline/project/begin.py reads them."""


class BuildWithFiles(build_py):
    """The packages, and the files."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # they lie beside the code
            return
        for pattern in FILES:
            paths = sorted(Path().glob(pattern))
            if not paths:
                raise FileNotFoundError(f"{pattern}, which the package needs, is not here; build it in a whole clone")
            for path in paths:
                target = Path(self.build_lib, "pipeline/project/repository", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithFiles})

"""Say which version of this package is installed, and the digest of its files: results/package.json.

The dvc.yaml of `m2f init` has it as the dependency of all that computes: another version of the package runs those
stages again, and they find their finished work by digest or key. In a clone of this project dvc.yaml names the code.
"""

from __future__ import annotations

import argparse

from stages import called, run


def command_line() -> argparse.ArgumentParser:
    """What can be said after the command."""
    return argparse.ArgumentParser(
        prog=called("package"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def main() -> None:
    """Do what the command line says."""
    command_line().parse_args()

    from pipeline.provenance.package import DISTRIBUTION, package_digest, package_version
    from pipeline.storage.results.folder import Package, write_package

    package = Package(name=DISTRIBUTION, version=package_version(), sha256=package_digest())
    write_package(package)
    print(f"{package.name} {package.version or 'without a version'}, sha256 {package.sha256[:16]}")


if __name__ == "__main__":
    run(main)

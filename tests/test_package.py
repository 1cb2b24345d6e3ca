"""What is built is complete, and works where the checkout is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

import pytest
import versions
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from hf_prune.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def files() -> set[str]:
    """What belongs to the package: its modules and what they read."""
    found = (path.relative_to(ROOT) for path in (ROOT / "hf_prune").rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_wheel_and_sources_are_complete(built: Path) -> None:
    (wheel,), (sources,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name == f"hf_prune-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info" not in name}
        (metadata,) = (name for name in file.namelist() if name.endswith("METADATA"))
        said = Parser().parsestr(file.read(metadata).decode())
    assert names == files()
    assert said["Version"] == __version__
    assert {"demo", "docs", "gguf", "onnx", "openvino", "plot"} < set(said.get_all("Provides-Extra", []))
    with tarfile.open(sources) as archive:
        assert files() | {"README.md", "LICENSE"} <= {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_works_where_the_checkout_is_not(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, which sees the libraries of this one, and no other hf_prune."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    assert subprocess.run(install, capture_output=True).returncode == 0
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(others))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), str(ROOT / "tests" / "smoke.py")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(site)


# -------------------------------------------------------------------------------------------------------------------- versions


@pytest.fixture
def declared() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


MEASURED = json.loads(versions.RESULTS.read_text(encoding="utf-8"))


def test_both_ends_of_what_is_claimed_were_tried(declared: ConfigParser) -> None:
    """The oldest and the newest libraries, on the oldest and the newest Python; nothing that was tried has failed."""
    assert [row for row in MEASURED if row["failed"] or row["tests"] == row["skipped"]] == []
    ends = {(python, which) for python in (versions.PYTHONS[0], versions.PYTHONS[-1]) for which in ("oldest", "newest")}
    assert ends <= {(row["python"], row["which"]) for row in MEASURED}
    claimed = declared["metadata"]["classifiers"].split("\n")
    assert [name.rpartition(" ")[2] for name in claimed if "Python :: 3." in name] == list(versions.PYTHONS)
    assert declared["options"]["python_requires"] == f">={versions.PYTHONS[0]}"


def test_lower_bounds_are_those_that_were_measured(declared: ConfigParser) -> None:
    lines = [*declared["options"]["install_requires"].split(), *declared["options.extras_require"]["lora"].split()]
    bounds = dict(line.split(">=") for line in lines)
    (oldest,) = (row for row in MEASURED if (row["python"], row["which"]) == (versions.PYTHONS[0], "oldest"))
    for name in bounds.keys() & set(versions.LIBRARIES):
        assert Version(oldest[name]) == Version(bounds[name]), name


def test_the_page_shows_what_was_measured() -> None:
    page = versions.PAGE.read_text(encoding="utf-8")
    assert versions.in_page(page, MEASURED) == page


@pytest.mark.parametrize("python", ["3.10.0", "3.11.0", "3.11.5", "3.12.0", "3.13.0"])
def test_a_constraint_leaves_a_python_what_can_be_installed_there(python: str) -> None:
    """Where nothing fits a constraint, pip searches without an end."""
    here = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    installed = {canonicalize_name(one.metadata["Name"]): one.metadata["Requires-Python"] for one in distributions()}
    here_too = [pin for pin in pins if canonicalize_name(pin.name) in installed]  # others are for another system
    assert len(here_too) > 0.95 * len(pins)
    for pin in here_too:
        if pin.marker is None or pin.marker.evaluate(here):
            assert python in SpecifierSet(installed[canonicalize_name(pin.name)] or ""), pin

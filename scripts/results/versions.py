"""Which versions of Python and of other libraries work: what `scripts/test_versions.sh` measures.

The oldest set is what uv resolves with `--resolution lowest-direct`: the lower bounds in `setup.cfg` themselves, or the first
release after a bound that has a wheel for the Python. The newest is what pip would choose. In each, the wheel is installed into an
empty environment, smoke-tested outside of the checkout, and must pass all tests marked `core`. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: What the wheel is installed with: the extras that the core needs, and what runs the tests.
EXTRAS, RUNNERS = ("demo", "lora", "onnx"), ("hypothesis", "pytest", "ruff")
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "onnxruntime")
BEGIN, END = "<!-- table: bash scripts/test_versions.sh -->", "<!-- end of table -->"

Row = dict[str, Any]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that has to succeed; its output is shown if it does not."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


def requirements() -> list[str]:
    """What `setup.cfg` asks for, with the extras. Named one by one, since uv takes the lowest release of nothing else."""
    declared = ConfigParser()
    declared.read(ROOT / "setup.cfg")
    parts = [declared["options"]["install_requires"], *(declared["options.extras_require"][extra] for extra in EXTRAS)]
    return "\n".join(parts).split()


def measure(python: str, which: str, wheel: Path, work: Path) -> Row:
    """Install one combination, try it and remove it.

    Args:
        python: a version of Python, such as `"3.12"`.
        which: `"oldest"`, `"newest"`, or a release of transformers, with the newest of everything else.
        wheel: the wheel of hf_prune.
        work: a folder for the environment.
    """
    uv, home = os.environ["UV"], work / "environment"
    run(uv, "venv", "--quiet", "--clear", "--python", python, home)
    install = (uv, "pip", "install", "--quiet", "--only-binary", ":all:", "--python", home / "bin" / "python")
    resolution = "lowest-direct" if which == "oldest" else "highest"
    exact = [] if which in ("oldest", "newest") else [f"transformers=={which}"]
    run(*install, "--resolution", resolution, *requirements(), *exact)
    run(*install, *RUNNERS)
    run(*install, "--no-deps", wheel)
    outside = work / "outside"
    outside.mkdir(exist_ok=True)
    smoke = run(home / "bin" / "python", ROOT / "tests" / "smoke.py", cwd=outside).stdout.splitlines()[-1]
    if not Path(smoke).is_relative_to(home):
        sys.exit(f"the smoke test used {smoke}, not the wheel")
    listed = json.loads(run(uv, "pip", "list", "--quiet", "--format", "json", "--python", home / "bin" / "python").stdout)
    found = {package["name"]: package["version"] for package in listed}
    report = work / "core.xml"
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.core" in path.read_text(encoding="utf-8")]
    # Without `python -m`, which would put the checkout before the wheel.
    command = [
        home / "bin" / "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "core and not slow",
        "--tb=short",
        f"--junitxml={report}",
    ]
    done = subprocess.run([str(word) for word in [*command, *files]], cwd=ROOT, capture_output=True, text=True)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    if failed:
        print(done.stdout[-6000:], file=sys.stderr)
    shutil.rmtree(home)
    counts = {"tests": int(suite.get("tests", 0)), "skipped": int(suite.get("skipped", 0)), "failed": failed}
    return {"python": python, "which": which} | {name: found[name] for name in LIBRARIES} | counts


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    columns = ("python", "which", *LIBRARIES)
    lines = [" | ".join(("Python", *columns[1:], "core tests")), " | ".join(["---"] * (len(columns) + 1))]
    for row in rows:
        passed = row["tests"] - row["skipped"] - row["failed"]
        verdict = f"{passed} passed" + (f", **{row['failed']} failed**" if row["failed"] else "")
        lines.append(" | ".join((*(row[name] for name in columns), verdict)))
    return "\n".join(f"| {line} |" for line in lines)


def in_page(text: str, rows: Iterable[Row]) -> str:
    """A page with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}"


def order(row: Row) -> tuple[int, int, str]:
    """Pythons one after the other, the oldest set first and the newest last."""
    rank = {"oldest": 0, "newest": 2}.get(row["which"], 1)
    return PYTHONS.index(row["python"]), rank, row["transformers"]


def main(work: Path, wanted: list[str]) -> None:
    """Measure what is wanted: nothing for all, a Python, or a Python and `oldest`, `newest` or a release of transformers."""
    python, which = [*wanted, None, None][:2]
    if len(wanted) > 2 or (python and python not in PYTHONS):
        sys.exit(f"usage: test_versions.sh [{'|'.join(PYTHONS)}] [oldest|newest|RELEASE OF TRANSFORMERS]")
    run(os.environ["UV"], "build", "--quiet", "--wheel", "--out-dir", work, ROOT)
    (wheel,) = work.glob("*.whl")
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    failed = 0
    for one in (python,) if python else PYTHONS:
        for set_ in (which,) if which else ("oldest", "newest"):
            row = measure(one, set_, wheel, work)
            failed += row["failed"]
            print(table([row]), flush=True)
            rows = sorted([other for other in rows if (other["python"], other["which"]) != (one, set_)] + [row], key=order)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

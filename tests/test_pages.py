"""What pages, docstrings and comments name exists: files, modules, anchors, commands, and the names in cross-references."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import hf_prune
from hf_prune.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(ROOT / "model_cards" / name for name in ("README.md", "results/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
SOURCES = sorted(path for folder in ("hf_prune", "scripts", "tests") for path in (ROOT / folder).rglob("*.py"))
#: Where a path may begin besides the folder of the file that names it.
FOLDERS = [ROOT, *(ROOT / name for name in ("hf_prune", "scripts", "scripts/recipes", "tests"))]
#: The kinds of files of which a name is meant as a path in this repository, when they are no results of a run.
PATH = re.compile(
    r"(?<![\w./{}-])(?:[\w.-]+/)*[\w-]+\.(?:py|sh|toml|cfg)(?![\w./])|(?:scripts|model_cards)/[\w./-]+\.(?:json|md|py|sh)"
)
#: Files named that are not in this repository: those of a checkpoint, of transformers and of other projects.
ELSEWHERE = {"modeling_hf_prune.py", "run_bertology.py", "modeling.py", "setup.py"}


def texts(path: Path) -> str:
    """The docstrings and comments of a module, the whole of a page."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return content
    tree = ast.parse(content)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node, clean=False) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    comments = [token.string for token in tokenize.generate_tokens(io.StringIO(content).readline) if token.type == tokenize.COMMENT]
    return "\n".join([*docs, *comments])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=relative)
def test_files_and_modules_exist(path: Path) -> None:
    found = texts(path)
    missing = {
        name
        for name in PATH.findall(found)
        if Path(name).name not in ELSEWHERE and not any((folder / name).is_file() for folder in (path.parent, *FOLDERS))
    }
    dotted = {name for name in re.findall(r"`hf_prune\.([a-z_.]+)`", found) if name not in hf_prune.__all__}
    assert missing | {name for name in dotted if find_spec(f"hf_prune.{name}") is None} == set()


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_links_to_others_are_well_formed() -> None:
    """Whether they lead somewhere needs a network: `sphinx --builder linkcheck docs docs/_build/links`."""
    links = {link for page in PAGES for link in re.findall(r"\]\((https?:[^)\s]*)\)?", page.read_text(encoding="utf-8"))}
    assert links
    assert [link for link in links if not re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./%#?=&~+-]*)?", link)] == []
    papers = [link for link in links if "arxiv.org" in link]
    assert [link for link in papers if not re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link)] == []


def test_commands_exist() -> None:
    """Those in prose too; command lines of their own are run by `test_readme.py`."""
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    named = {name for path in [*PAGES, *SOURCES] for name in re.findall(r"`hf-prune ([a-z]+)", texts(path))}
    assert named - commands == set()
    assert named


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """The names that a module defines, those in classes with their class."""
    for node in ast.iter_child_nodes(tree):
        names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (prefix + name for name in names)
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{node.name}.")


def test_cross_references_name_something() -> None:
    """A name in [`…`] is one that the library or the scripts define; of a class of others, such as transformers', none is."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES if "tests" not in path.parts}
    known = {name for tree in trees.values() for name in definitions(tree)}
    dangling = [
        f"{relative(path)}: {name}"
        for path in trees
        for name in re.findall(r"\[`([\w.]+)`\]", texts(path))
        if name.removeprefix("hf_prune.") not in known
    ]
    assert dangling == []


# --------------------------------------------------------------------------------------------------------------- documentation


def test_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    """Links and cross-references lead somewhere, and every page is in the table of contents."""
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "--builder", "html"]
    pages = tmp_path / "html"
    done = subprocess.run([*command, str(DOCS), str(pages)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (pages / "api" / "condensing.html").read_text(encoding="utf-8")
    assert 'href="#hf_prune.condense_plan"' in page


def test_the_reference_has_every_public_name() -> None:
    found = re.findall(
        r"^\.\. auto(?:class|function):: hf_prune\.(\w+)$", "\n".join(map(texts, (DOCS / "api").glob("*.md"))), re.MULTILINE
    )
    assert sorted(found) == sorted(hf_prune.__all__)


def test_messages_that_are_explained_exist() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_prune").rglob("*.py"))
    messages = re.findall(r"\*\*`([^`]+)`", texts(DOCS / "troubleshooting.md"))
    assert [message for message in messages if message not in sources] == []
    assert messages


def test_the_readme_is_what_a_visitor_needs() -> None:
    assert len(texts(ROOT / "README.md").splitlines()) <= 150

"""The documentation: its code runs, its navigation is whole, the errors it explains exist, its pictures are drawn."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

import tasks
from graft import batches
from models import perturbed, tiny_bert
from peft_graft import RULES
from peft_graft.cli.main import build_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# ```python runs; ```py is only shown.
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.S | re.M)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def code_of(page: Path) -> str:
    """All Python of a page, on the lines where it stands, so that a traceback names them."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    for match in BLOCK.finditer(text):
        start, code = text.count("\n", 0, match.start(1)), match[1].splitlines()
        lines[start : start + len(code)] = code
    return "\n".join(lines)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="transformers 5.0 writes the names of old checkpoints"
)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no accelerator here
@pytest.mark.filterwarnings("ignore:patch should be smaller than the donor:UserWarning")  # of so small a donor
@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(
    page: Path,
    world: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other_donor"
    perturbed(tiny_bert(num_labels=2)).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(world["base"])
    rows = tasks.tokenize(tasks.load_rows(world["train"], limit=96), tokenizer)
    calibration, dataloader = (batches(rows.select(range(*part)), tokenizer, 16) for part in ((0, 32), (32, 96)))
    known = {"calibration": calibration, "dataloader": dataloader, "batch": calibration[0], "train": rows}
    code = code_of(page).replace("path/to/base", world["base"]).replace("path/to/donor", world["donor"])
    code = code.replace("path/to/other_donor", str(other))
    # The pages show the densities of real models; these have a few thousand entries.
    code = re.sub(r"density=1e-[34]", "density=1e-2", code)
    exec(compile(code, str(page), "exec"), known)


COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("peft-graft ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    build_parser().parse_args(shlex.split(line, comments=True)[1:])


# Errors that are quoted but raised elsewhere.
FOREIGN = ("KeyError: 'GRAFT'", "Only one adapter can be set at a time for ModulesToSaveWrapper")


def texts_of(path: Path) -> list[str]:
    """Every string of a source file, with `...` for what an f-string fills in; `f(what, constraint)` as an error."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(p.value if isinstance(p, ast.Constant) else "..." for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.Call):
            found.append(" must be ".join(str(a.value) for a in node.args[:2] if isinstance(a, ast.Constant)))
    return found


def quoted_errors() -> list[str]:
    """What the headings of the troubleshooting page quote."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return [quote for heading in re.findall(r"^### (.*)", text, flags=re.M) for quote in re.findall("`(.*?)`", heading)]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    return [text for path in (ROOT / "src").rglob("*.py") for text in texts_of(path)]


@pytest.mark.parametrize("quote", [quote for quote in quoted_errors() if quote not in FOREIGN])
def test_quoted_errors_exist(quote: str, messages: list[str]) -> None:
    parts = [re.escape(part) for part in quote.split("...")]
    assert any(re.search(".*?".join(parts), message, flags=re.S) for message in messages)


def pages_in(nav: list) -> list[str]:
    """Paths in a navigation, in order."""
    found = []
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages_in(value) if isinstance(value, list) else [value]
    return found


def test_every_page_is_in_the_navigation() -> None:
    listed = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(name_of(page) for page in PAGES), "nav of mkdocs.yml and the files in docs/ differ"


FRONT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "model_cards/README.md")


@pytest.mark.parametrize("page", FRONT_PAGES)
def test_links_of_the_front_pages_lead_somewhere(page: str) -> None:
    """MkDocs checks the links between the pages of docs/; these pages are outside of it."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / path
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), flags=re.M)
            known = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in known, f"{page} links to {target}"


def test_the_template_of_the_cards_is_that_of_the_package() -> None:
    assert (ROOT / "model_cards" / "TEMPLATE.md").read_text(encoding="utf-8").startswith("---")


def test_every_rule_is_explained() -> None:
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    assert {rule for rule in RULES if f"| `{rule}` |" not in text} == set()


def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'peft-graft[plots]'")
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    drawn = {path.name for path in pictures.draw(tmp_path)}
    assert drawn == {path.name for path in (DOCS / "pictures").glob("*.png")} - {"app.png"}
    shown = re.findall(r"\]\(([^)]*\.png)\)", "".join(page.read_text(encoding="utf-8") for page in PAGES))
    assert drawn <= {Path(path).name for path in shown}


@pytest.mark.slow
def test_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the site needs pip install 'peft-graft[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "GraftConfig" in (tmp_path / "api" / "grafting.html").read_text(encoding="utf-8")
    outside = re.compile(r'<(?:script|link|img)[^>]* (?:src|href)="https?://')
    assert [page for page in tmp_path.rglob("*.html") if outside.search(page.read_text(encoding="utf-8"))] == []

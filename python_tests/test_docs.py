"""Every code block of CONTRIBUTING.md, docs/ and README.md is run, or is part of a program that is; links and pictures
lead somewhere. test_readme.py runs the README's Python and `flexdit` commands and looks at what they give."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_model

from flexdit_ext.__main__ import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page, language, code)
    for page in PAGES
    for language, code in re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
]
# Where a block's text must stand, but for white space and comments; these are compiled, configured and run by ctest.
SOURCES = {
    "cpp": [*(ROOT / "examples/cpp").glob("*.cpp"), *(ROOT / "csrc/tests/consumer").glob("*.cpp")],
    "cmake": [ROOT / "csrc/tests/consumer/CMakeLists.txt"],
}
INSTALL = "cmake --install build/cpp --prefix build/installed --component development"


def blocks(language: str) -> list:
    found = [(page, code) for page, known, code in BLOCKS if known == language]
    return [pytest.param(page, code, id=f"{page.name}-{i}") for i, (page, code) in enumerate(found)]


def test_every_block_has_a_known_language():
    assert {language for _, language, _ in BLOCKS} <= {"python", "sh", "toml", *SOURCES}
    assert {page.name for page, _, _ in BLOCKS} >= {"README.md", "training.md", "serving.md", "cpp.md", "method.md"}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the repository's programs, and a small model where `make demo` leaves its own."""
    for name in ("bench", "docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    tiny_model(num_classes=10).save_pretrained(tmp_path / "out" / "flexdit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, folder: Path) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "flexdit":
        assert main(words[1:]) == 0
        return
    options = {
        "cwd": folder,
        "env": os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
    }
    if words[0] == "make":  # that there is such a target; building it all takes too long
        words, options["cwd"] = ["make", "-n", *words[1:]], ROOT
    elif words[0] == "cmake":
        if line == INSTALL:  # as install_test.cmake does it
            return
        words = [word.replace("build/", f"{folder}/build/") for word in words]
        words += ["--", "-n"] if "--build" in words else []
        options["cwd"] = ROOT
    else:
        assert words[0] == "python", f"{line}: the test does not know how to run this"
        words[0] = sys.executable
    result = subprocess.run(words, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{line}: {result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, workplace):
    """In the page's order; Python goes on from block to block."""
    scope = {"__name__": page.stem}
    for language, code in [(language, code) for other, language, code in BLOCKS if other == page]:
        if language == "python" and page != README:
            exec(compile(code, str(page), "exec"), scope)
        elif language == "toml":
            Path(re.match(r"# (\S+\.toml)\n", code)[1]).write_text(code)
        elif language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                if page != README or not line.startswith("flexdit "):
                    run(line, workplace)


@pytest.mark.parametrize("page, code", blocks("toml"))
def test_configuration(page, code, workplace):
    pytest.importorskip("accelerate")
    from flexdit_ext.training import load_config

    (workplace / "run.toml").write_text(code)
    load_config(workplace / "run.toml")


def squeezed(text: str, comment: str) -> str:
    """Without comments and white space."""
    return re.sub(r"\s+", "", re.sub(rf"{comment}[^\n]*|/\*.*?\*/", "", text))


@pytest.mark.parametrize("page, code", [*blocks("cpp"), *blocks("cmake")])
def test_part_of_a_program(page, code):
    """Piece by piece: an empty line may leave something out."""
    language = next(known for _, known, other in BLOCKS if other == code)
    comment = {"cpp": "//", "cmake": "#"}[language]
    pieces = [squeezed(piece, comment) for piece in code.split("\n\n")]
    sources = [squeezed(source.read_text(), comment) for source in SOURCES[language]]
    assert all(pieces)
    assert any(all(piece in source for piece in pieces) for source in sources)


def test_install_is_what_ctest_does():
    assert "--component development" in (ROOT / "csrc/tests/install_test.cmake").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


def test_pictures_are_drawn(tmp_path):
    """As many and as large as those that are committed; pixels depend on the fonts."""
    subprocess.run([sys.executable, ROOT / "docs/pictures.py", tmp_path], check=True)
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    kept = {path.name: path.stat().st_size for path in (ROOT / "docs/pictures").iterdir() if path.name in drawn}
    assert set(drawn) == set(kept) == {"token_grids.png", "blocks.png", "macs.png", "ragged.png"}
    assert kept == pytest.approx(drawn, rel=0.3)


def test_changelog_has_the_version():
    from flexdit_ext import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()

"""What the README's code gives, and its tables against bench/results. That all its blocks run: test_docs.py."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from helpers import tiny_model

from flexdit_ext.__main__ import main

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_python_blocks_run():
    scope = {}
    model, sampling = (compile(code, "README.md", "exec") for code in blocks("python"))
    exec(model, scope)
    assert scope["latents"].shape == (3, 4, 16, 16)
    exec(sampling, scope)  # it goes on with the model
    assert scope["images"].shape == (3, 4, 16, 16)
    shapes = {key: tuple(latent.shape) for key, latent in scope["latents"].items()}
    assert shapes == {scope["first"]: (4, 16, 16), scope["second"]: (4, 8, 12)}


def test_commands_run(tmp_path, monkeypatch, capsys):
    """With a smaller model where `make demo` writes its own."""
    tiny_model(num_classes=10).save_pretrained(tmp_path / "out" / "flexdit")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("flexdit ")]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert [line.split()[1] for line in lines] == ["sample", "sample", "bench", "info"]
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"00015_7.png", "grid.png", "latents.npy", "00002_2.png"} <= images and len(images) == 16 + 3 + 2


def test_tables_show_the_committed_results():
    result = subprocess.run([sys.executable, "bench/readme.py", "--check"], cwd=ROOT)
    assert result.returncode == 0, "README.md is older than bench/results: run bench/readme.py"

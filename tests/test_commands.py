"""pytest tests/test_commands.py: every file runs as its docstring says, every command of README.md is one."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import sample
import train

ROOT = Path(__file__).resolve().parents[1]


def python(*argv, cwd):
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "masks", "text_vae", "image_vae", "mmdit", "data", "scenes"])
def test_demonstrations(name, tmp_path):
    """Lines that say what to expect, and no file but the picture that masks.py draws."""
    done = python(ROOT / f"{name}.py", cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) >= 3 and "expect" in done.stdout and "nan" not in done.stdout.split(), done.stdout
    if name == "image_vae":
        assert "64 x 64 by the same weights: (8, 8)" in done.stdout and "refused: image size 30 x 44" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == ({"masks.png"} if name == "masks" else set())


@pytest.mark.slow
@pytest.mark.parametrize("argv", ["train.py --help", "sample.py --help", "sample.py t2i --help",
                                  "sample.py it2t --help", "sample.py t2t --help"])
def test_help(argv, tmp_path):
    script, *rest = argv.split()
    done = python(ROOT / script, *rest, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}") and not done.stderr
    assert not list(tmp_path.iterdir())


def commands_of(text):
    """(script, arguments) of each train.py or sample.py command in the fenced blocks of a Markdown text."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for command in line.removeprefix("$ ").split("&&"):
                match = re.match(r"\s*(?:python3?|torchrun\s.*?)\s+(train|sample)\.py\b(.*)", command)
                if match:
                    found.append((match[1], shlex.split(match[2], comments=True)))
    return found


MARKDOWN = r"""
```bash
pip install -r requirements.txt && python train.py
python sample.py t2i "a b" \
    --out a.png  # why
torchrun --nproc_per_node=8 train.py --data DIR
ls
```
python train.py --not_in_a_block
"""


def test_commands_are_found():
    assert commands_of(MARKDOWN) == [
        ("train", []), ("sample", ["t2i", "a b", "--out", "a.png"]), ("train", ["--data", "DIR"])]


def test_commands_of_the_readme_parse(capsys):
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md")
    commands = commands_of(readme.read_text())
    assert {script for script, _ in commands} == {"train", "sample"}
    for script, argv in commands:
        try:
            args = {"train": train.parse, "sample": sample.parse}[script](argv)
            if script == "train":
                train.check(args)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"README.md: {script}.py {shlex.join(argv)}: {capsys.readouterr().err or error}")


def test_defaults_in_the_readme():
    """Its table of flags: `--names [value]` | default, .. | why."""
    table = (ROOT / "README.md").read_text().split("## Flags worth turning")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(--[^`]+)` \| ([^|]+) \|", table, re.M)
    assert len(rows) > 10
    args = vars(train.parse([]))
    for flags, defaults in rows:
        names = re.findall(r"--(\w+)", flags)
        assert [str(args[name]) for name in names] == [d.strip() for d in defaults.split(", ")], flags


def test_lengths_in_the_readme():
    """The last column of its table of files: lines, rounded."""
    table = (ROOT / "README.md").read_text().split("## Read in this order")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\S+?)/? \|.*\| (\d+) \|$", table, re.M)
    assert len(rows) == 11
    for name, lines in rows:
        path = ROOT / name if name.endswith(".py") else ROOT / name / "__init__.py"
        assert int(lines) == pytest.approx(len(path.read_text().splitlines()), rel=0.05), name

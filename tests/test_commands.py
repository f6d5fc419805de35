"""pytest tests/test_commands.py"""
import ast
import graphlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import config
import release
import train
from cola import Tokenizer
from test_release import system

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text()
COMMANDS = ("train", "sample", "evaluate", "likelihood", "release")
DEMONSTRATIONS = ["flow.py", "masks.py", "text_vae.py", "image_vae.py", "mmdit.py", "cola.py",
                  "config.py", "data.py", "batches.py", "workers.py", "checkpoint.py"]


def python(*argv, cwd):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env=env)


# ---- Programs ----------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", [*DEMONSTRATIONS, "scenes.pictures", "scenes.language"])
def test_demonstrations_say_what_to_expect(name, tmp_path):
    done = python(*([ROOT / name] if name.endswith(".py") else ["-m", name]), cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(done.stdout.splitlines()) >= 3 and "expect" in done.stdout, done.stdout
    assert {p.name for p in tmp_path.iterdir()} == ({"masks.png"} if name == "masks.py" else set())


@pytest.mark.slow
def test_help(tmp_path):
    for name in COMMANDS:
        done = python(ROOT / f"{name}.py", "--help", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}.py"), done.stderr
    assert not list(tmp_path.iterdir())


# ---- README ------------------------------------------------------------------------------------

def commands_of(text):
    """(program, arguments) of each command in the fenced blocks of a Markdown text."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.removeprefix("$ ").split("&&"):
                match = re.match(r"\s*(?:(?:python3?|torchrun\s.*?)\s+(?:-m\s+)?|bash\s+)"
                                 r"(\w+\.py|experiments[./][\w.]+)(.*)", command)
                if match:
                    found.append((match[1], shlex.split(match[2], comments=True)))
    return found


def test_every_program_in_a_block_of_the_readme_is_a_command():
    blocks = re.findall(r"^ *```.*?^ *```", README, re.M | re.S)
    programs = re.findall(r"\w+\.py|experiments[./][\w.]+", "".join(blocks))
    assert programs == [program for program, _ in commands_of(README)]
    argv = ["t2i", "a large red circle above a small blue square on a gray background", "--out",
            "a.png"]
    assert ("sample.py", argv) in commands_of(README)


@pytest.mark.parametrize("program, argv", commands_of(README))
def test_commands_of_the_readme_parse(program, argv, tmp_path, monkeypatch, capsys):
    for path in ROOT.glob("*.flags"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    name = program.removesuffix(".py")
    if program.startswith("experiments"):
        path = (ROOT / program.replace(".", "/")).with_suffix(".py")
        assert path.exists() or (ROOT / program).exists()
    elif name == "train":
        config.merge(config.parse(argv))           # SystemExit or ValueError for a wrong flag
    elif name in COMMANDS:
        # A wrong flag raises SystemExit. What follows is the refusal of a missing checkpoint.
        assert importlib.import_module(name).main(argv) == 2, capsys.readouterr().err
    else:
        assert program in DEMONSTRATIONS


@pytest.mark.parametrize("argv", [argv for _, argv in commands_of(README)
                                  if any(word.startswith("@") for word in argv)])
def test_large_models_of_the_readme_build_at_reduced_size(argv, tmp_path, monkeypatch, capsys):
    """With the generated scenes, and a small release of ours for the public one."""
    monkeypatch.chdir(ROOT)
    small = ("--image_size 32 --image_vae_width 16 --image_vae_levels 1 1 1 1 --batch_size 2 "
             f"--device cpu --procs 1 --bf16 off --dry_run --out_dir {tmp_path}/out").split()
    words = " ".join(argv).replace("--data PICTURES", "").replace("--text FILE", "").split()
    if "--init_official" in words:
        release.save(system(Tokenizer.train(["a red circle"] * 3, 300)), tmp_path / "R")
        words[words.index("DIR")] = str(tmp_path / "R")
    else:
        small += ("--width 64 --layers 3 --heads 2 --text_vae_width 32 --text_vae_heads 2 "
                  "--tokenizer= --text_vae_batch 2").split()
    assert train.main([*words, *small]) == 0
    shown = capsys.readouterr().out
    assert "--lr 0.00015" in shown and "cosine" in shown and "it2t, the first of them P" in shown


def test_defaults_in_the_readme():
    """Rows of its table of flags: | `--name [value] ..` | default, .. | why |"""
    rows = re.findall(r"^\| `(--[^`]+)` \| ([^|]+) \|", README, re.M)
    assert len(rows) >= 10
    args = vars(config.merge({}))
    for flags, defaults in rows:
        values = [args[name] for name in re.findall(r"--(\w+)", flags)]
        shown = [" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in values]
        assert shown == [x.strip() for x in defaults.split(", ")], flags


# ---- The files ---------------------------------------------------------------------------------

def test_files_are_few_and_short():
    assert len(FILES) <= 16, [path.name for path in FILES]
    folders = (ROOT / name for name in ("", "scenes", "cuda_attention", "experiments", "tests"))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        lines = path.read_text().splitlines()
        assert len(lines) <= 500 and max(map(len, lines), default=0) <= 100, path
        functions = [node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == [], path


def imports_of(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_files_import_in_one_direction():
    packages = {"scenes", "cuda_attention"}
    own = {path.stem for path in FILES} | packages
    graph = {name: set() for name in own}
    for path in [*FILES, *(p for package in packages for p in (ROOT / package).glob("*.py"))]:
        name = path.stem if path.parent == ROOT else path.parent.name
        graph[name] |= {x.split(".")[0] for x in imports_of(path)} & own - {name}
        assert "TYPE_CHECKING" not in path.read_text(), path
    graphlib.TopologicalSorter(graph).prepare()    # CycleError names the circle

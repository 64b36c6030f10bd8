"""The simulation and what learns from it know nothing of each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SIMULATION = ROOT / "rlhf" / "simulation"


def imported(file):
    """Every module that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*folder, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


def test_simulation_runs_without_torch():
    code = (
        "import sys, rlhf.simulation.vote, rlhf.simulation.judge, rlhf.simulation.ears\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate', 'gradio', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("file", sorted(SIMULATION.glob("*.py")), ids=lambda file: file.name)
def test_simulation_imports_only_itself_from_the_house(file):
    house = {name for name in imported(file) if name.split(".")[0] in {"base_models", "db", "adapters", "feedback_app", "rlhf"}}
    assert all(name.startswith("rlhf.simulation") for name in house), house


def test_nothing_else_imports_the_simulation():
    files = [file for top in ("base_models", "db", "adapters", "feedback_app", "rlhf") for file in (ROOT / top).rglob("*.py")]
    guilty = [
        str(file.relative_to(ROOT))
        for file in files
        if SIMULATION not in file.parents and any(name.startswith("rlhf.simulation") for name in imported(file))
    ]
    assert len(files) > 30
    assert guilty == []

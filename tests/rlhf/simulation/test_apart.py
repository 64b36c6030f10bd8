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
        "import sys, rlhf.simulation.vote, rlhf.simulation.judge, rlhf.simulation.ears, rlhf.simulation.serve\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate', 'gradio', 'sqlalchemy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("file", sorted(SIMULATION.glob("*.py")), ids=lambda file: file.name)
def test_simulation_imports_only_itself_from_the_house(file):
    house = {name for name in imported(file) if name.split(".")[0] in {"base_models", "db", "adapters", "feedback_app", "rlhf"}}
    assert all(name.startswith("rlhf.simulation") for name in house), house


def test_nothing_else_imports_the_simulation():
    tops = ("base_models", "db", "adapters", "feedback_app", "rlhf", "benchmarks")
    files = [file for top in tops for file in (ROOT / top).rglob("*.py")]
    guilty = [
        str(file.relative_to(ROOT))
        for file in files
        if SIMULATION not in file.parents and any(name.startswith("rlhf.simulation") for name in imported(file))
    ]
    assert len(files) > 30
    assert guilty == []


def test_only_the_demo_and_the_proof_start_a_process_with_a_taste_in_it():
    """A trainer that named the module could start it, and ask it what nobody told."""
    allowed = {ROOT / "rlhf" / "demo.py", *(ROOT / "rlhf" / "proof").glob("*.py"), *SIMULATION.glob("*.py")}
    tops = ("base_models", "db", "adapters", "feedback_app", "rlhf")
    files = [file for top in tops for file in (ROOT / top).rglob("*.py") if file not in allowed]
    naming = [file for file in files if any(".simulation" in name for name in texts(file))]
    assert len(files) > 60
    assert naming == []


def texts(file):
    """Every string of a file's code that is not a docstring."""
    tree = ast.parse(file.read_text())
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
    ]


def test_nothing_that_trains_imports_the_proof():
    files = sorted((ROOT / "rlhf").glob("*.py"))
    assert not [file for file in files if any(name.startswith("rlhf.proof") for name in imported(file))]

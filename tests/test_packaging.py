"""The package as users get it: listed rooms, import rules, a wheel that runs a recipe by name."""

import ast
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("callbacks", "data", "geometry", "models", "optim", "recipes", "reports", "slurm")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> list[Path]:
    return [p for room in (*ROOMS, "evolute") for p in (ROOT / room).rglob("*.py") if not in_link(p)]


def in_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "evolute" else ("evolute", *parts))


def test_every_sub_package_is_listed():
    found = {module_of(p).removesuffix(".__init__") for p in sources() if p.name == "__init__.py"}
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_links_beside_the_package_lead_to_the_rooms():
    assert {p.name for p in (ROOT / "evolute").iterdir() if p.is_symlink()} == set(ROOMS)
    assert all((ROOT / "evolute" / room).resolve() == ROOT / room for room in ROOMS)


ALLOWED = {
    "geometry": {"geometry"},
    "optim": {"geometry", "optim"},
    "models": {"geometry", "models"},
    "data": {"geometry", "data"},
    "callbacks": {"geometry", "optim", "callbacks"},
    "reports": {"geometry", "reports"},
    "slurm": set(),
    "recipes": set(ROOMS),
    "evolute": {*ROOMS, "evolute"},
}


def imported(path: Path) -> set[str]:
    """The rooms of this project, and lightning, that a file imports anywhere."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    rooms = {name.split(".")[1] for name in names if name.startswith("evolute.")}  # the top package holds a version
    rooms = {room if room in ROOMS else "evolute" for room in rooms}
    return rooms | {"lightning" for name in names if name.split(".")[0] in ("lightning", "pytorch_lightning")}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    allowed = set(ALLOWED[room]) | (set() if room == "geometry" else {"lightning"})
    if path.name == "run_report.py":
        allowed.add("reports")
    assert imported(path) <= allowed


def python(code: str, executable: str = sys.executable, cwd: Path | None = None) -> str:
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_rooms_do_not_leak_as_top_level_packages(tmp_path):
    rooms = list(ROOMS)
    python(
        "import importlib.util, sys\n"
        f"assert not [r for r in {rooms!r} if importlib.util.find_spec(r)]\n"
        "import evolute.callbacks, evolute.reports\n"
        "ours = [m for name, m in list(sys.modules.items()) if name.split('.')[0] == 'evolute']\n"
        "files = [m.__file__ for m in ours if getattr(m, '__file__', None)]\n"
        "import os; real = [os.path.realpath(f) for f in files]\n"
        "assert len(real) == len(set(real)), 'a file was loaded under two names'\n",
        cwd=tmp_path,
    )
    assert not set(ROOMS) & set(sys.modules)


def test_importing_the_package_is_light():
    python("import sys, evolute; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)")
    python("import sys, evolute.geometry; assert 'lightning' not in sys.modules")


@pytest.mark.slow
def test_sdist_to_wheel_to_a_clean_environment_that_runs_a_recipe_by_name(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    venv.create(tmp_path / "clean", with_pip=False)
    site = next((tmp_path / "clean" / "lib").glob("python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(site), str(wheel)],
        check=True, timeout=300,
    )  # fmt: skip
    # The dependencies come from the environment of the tests; a path file does not bring its editable install along.
    import torch

    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parent.parent))
    clean = str(tmp_path / "clean" / "bin" / "python")
    origin = python("import evolute, evolute.callbacks as c; print(c.__file__)", clean, tmp_path)
    assert str(site) in origin
    done = subprocess.run(
        [clean, "-m", "evolute", "fit", "--config", "llm/pretrain", "--run", "out", "--trainer.max_steps", "2",
         "--trainer.log_every_n_steps", "1",
         "--trainer.callbacks", "[]", "--data.init_args.max_bytes", "400000", "--trainer.limit_val_batches", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"config.yaml", "metrics.csv", "report.html", "environment.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }

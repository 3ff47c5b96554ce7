"""The package as others get it: quick to import, complete in its wheel, and the same API from everywhere."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

import surgery

ROOT = Path(__file__).parents[1]
NEEDED_BY_CHECK = ("lark", "click")


def python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_every_public_name_is_there() -> None:
    for name in surgery.__all__:
        assert getattr(surgery, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = surgery.nonsense


def test_verify_stays_the_function() -> None:
    """There is a subpackage of that name; importing it must not replace the function."""
    importlib.import_module("surgery.verify.report")
    importlib.import_module("surgery.verify")
    assert callable(surgery.verify)
    assert "surgery.verify" in sys.modules
    assert surgery.verify is not sys.modules["surgery.verify"]


def test_the_package_and_check_import_no_torch() -> None:
    code = (
        "import sys, surgery, surgery.cli\n"
        "surgery.SurgeryError\n"
        "try: surgery.cli.main(['check', sys.argv[1]])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'bitsandbytes', 'rich'}\n"
        "found = {name for name in heavy if any(loaded.startswith(name + '.') for loaded in sys.modules)}\n"
        "assert not found, found"
    )
    assert "no errors" in python(code, str(ROOT / "specs" / "tour.surgery"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    keep = ("grammar", "surgery", "specs")
    for name in keep:
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, place / "source" / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=place / "source", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = place.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_every_module_the_grammar_and_the_specs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "surgery").rglob("*.py")}
    wanted |= {f"surgery/{path.relative_to(ROOT)}" for path in (ROOT / "specs").glob("*.surgery")}
    wanted |= {f"surgery/grammar/{name}" for name in ("surgery.lark", "errors.md", "README.md")} | {"surgery/py.typed"}
    assert wanted <= names, wanted - names
    assert not any(name.startswith(("tests", "grammar", "specs")) for name in names)


@pytest.mark.slow
def test_installed_wheel_checks_its_own_specs(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has nothing but what `check` needs: no torch, no checkout."""
    venv.create(tmp_path / "venv", symlinks=True)
    executable = next(path for path in (tmp_path / "venv").glob("*/python*") if path.stem == "python")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([executable, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)
    for name in NEEDED_BY_CHECK:
        for file in distribution(name).files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), site / file)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [executable, "-m", "surgery.cli", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    spec = site / "surgery" / "specs" / "tour.surgery"
    done = run("check", str(spec))
    assert done.returncode == 0, done.stderr
    assert "no errors" in done.stdout
    assert run("--version").stdout == f"surgery {surgery.__version__}\n"
    bad = tmp_path / "bad.surgery"
    bad.write_text("lora ranks 8 on attn.q\n")
    done = run("check", str(bad))
    assert done.returncode == 2
    assert "did you mean 'rank'" in done.stderr
    assert "S0" in run("explain", "S001").stdout


def test_versions_agree() -> None:
    """The one in pyproject.toml and the one that `--version` prints."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'\nversion = "{surgery.__version__}"\n' in text

# SPDX-License-Identifier: Apache-2.0
"""The kit for a machine without a network: packed here, unpacked by a bare Python, and used for a limited time."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import run

from trl_msl.experiments import gpu_kit


PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "trl_msl"
version = "0.1.0"
dependencies = ["kit-dependency>=1"]
optional-dependencies = { dev = [] }
"""
SLEEPER = """
import signal, sys, time
from pathlib import Path

place, signals = Path("sleeper.txt"), []
if place.exists():
    sys.exit()
signal.signal(signal.SIGINT, lambda *args: signals.append(1))
place.touch()
while not signals:
    time.sleep(0.01)
time.sleep(0.2)
place.write_text(str(len(signals)))
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The current folder: a checkout, the wheel of what it requires, a model and data; `cache` is elsewhere."""
    home = tmp_path / "home"
    files = {
        "checkout/pyproject.toml": PYPROJECT, "checkout/README.md": "", "checkout/LICENSE": "",
        "checkout/trl_msl/__init__.py": "TEXT = 'old'", "outputs/model/config.json": "{}", "data/Book/test.csv": "1",
        "../cache/Office/__pycache__/x.pyc": "", "../cache/Office/test.csv": "2",
    }  # fmt: skip
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (tmp_path / "cache" / "blob").write_bytes(random.Random(0).randbytes(2_500_000))
    (home / "outputs/model/model.safetensors").symlink_to(tmp_path / "cache" / "blob")
    (home / "wheels").mkdir()
    gpu_kit.write_empty_wheel(home / "wheels", "kit-dependency==1.5")
    monkeypatch.chdir(home)
    monkeypatch.setattr(gpu_kit, "CHECKOUT", home / "checkout")
    return home


def pack(output_dir) -> Path:
    folders = ["outputs/model", "data/Book", "../cache/Office"]
    run(gpu_kit, "--output_dir", output_dir, "--wheels", "wheels", "--part_size", 1, "--folders", *folders)
    return Path(output_dir)


def unpack(kit, folder) -> tuple[int, str]:
    command = [sys.executable, "-I", str(kit / "unpack.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    return result.returncode, result.stdout + result.stderr


def ask(folder, code: str) -> str:
    command = [
        str(folder / "venv" / "bin" / "python"),
        "-I",
        "-c",
        f"import trl_msl, importlib.metadata; print({code})",
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_kit(home, tmp_path):
    kit, there = pack("outputs/kit"), tmp_path / "there"
    parts = [path.name for path in sorted(kit.glob("part-*"))]
    assert parts == ["part-000", "part-001", "part-002"]
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    shutil.copy(kit / "unpack.py", uploaded)
    assert unpack(uploaded, there) == (1, "missing: SHA256SUMS\n")
    shutil.copy(kit / "SHA256SUMS", uploaded)
    data = bytearray((kit / "part-002").read_bytes())
    data[-1] ^= 1
    (uploaded / "part-002").write_bytes(data)
    assert unpack(uploaded, there) == (1, "missing: part-000 part-001\ndamaged, upload again: part-002\n")
    assert not there.exists()
    for name in parts:
        shutil.copy(kit / name, uploaded)
    code, output = unpack(uploaded, there)
    assert code == 0 and f"source {there}/venv/bin/activate" in output, output
    packed = {"outputs/model/config.json", "outputs/model/model.safetensors", "data/Book/test.csv", "Office/test.csv"}
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(("venv/", "wheels/"))} == packed
    assert (there / "outputs/model/model.safetensors").read_bytes() == (tmp_path / "cache" / "blob").read_bytes()
    assert ask(there, "trl_msl.TEXT, importlib.metadata.version('kit-dependency')") == "old 1.5"
    assert ask(there, "trl_msl.__file__").startswith(str(there / "venv"))

    # The checkout has changed, but not its version: only the last part is another
    (home / "checkout/trl_msl/__init__.py").write_text("TEXT = 'new'")
    again = pack("outputs/again")
    changed = [name for name in parts if (again / name).read_bytes() != (kit / name).read_bytes()]
    assert changed == parts[-1:]
    (there / "outputs/model/trained").touch()
    assert unpack(again, there)[0] == 0
    assert ask(there, "trl_msl.TEXT") == "new" and (there / "outputs/model/trained").exists()
    for name in parts:  # all is there: the parts aren't looked at
        (again / name).unlink()
    assert unpack(again, there)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output_dir", "wheels"], "`output_dir` = 'wheels' exists"),
        (["--part_size", 0], "`part_size` = 0 must be at least 1 MB"),
        (["--folders", "nowhere"], "`folders` has 'nowhere', which is no folder"),
        (["--folders", "wheels"], "`folders` has 'wheels', whose name in the kit, 'wheels', is taken"),
        (["--folders", "data/Book", "./data/Book"], "whose name in the kit, 'data/Book', is taken"),
        (["--wheels", "data"], "`wheels` = 'data' has no wheels"),
        (["--present", "torch"], "`present` has 'torch': write NAME==VERSION"),
    ],
)
def test_options_that_make_no_kit(home, options, message):
    with pytest.raises(ValueError, match=message):
        run(gpu_kit, *options)


def test_rows_are_run_for_a_limited_time(tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    rows = [
        "# a comment",
        "WORD=first; echo $WORD >> out.txt",
        f"{sys.executable} sleeper.py",
        "exit 3",
        "echo 'last' >> out.txt",
    ]
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    script = Path(gpu_kit.__file__).with_name("run_rows.sh")
    codes = []
    for seconds in ("2", "60"):
        command = ["bash", str(script), "rows.txt", seconds]
        codes.append(subprocess.run(command, cwd=tmp_path, timeout=100, capture_output=True).returncode)
        if seconds == "2":
            assert (tmp_path / "sleeper.txt").read_text() == "1"  # one signal: a second one ends a training at once
            assert (tmp_path / "out.txt").read_text() == "first\n"
    assert codes == [124, 1]
    assert (tmp_path / "out.txt").read_text() == "first\nlast\n"
    assert (tmp_path / "rows.txt.done").read_text().splitlines() == [rows[1], rows[2], rows[4]]

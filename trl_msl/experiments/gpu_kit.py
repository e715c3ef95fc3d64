# SPDX-License-Identifier: Apache-2.0
"""
Pack what a machine with a GPU, Python and PyTorch but no network needs to train with trl_msl: the package itself from
a checkout, the packages that it requires, and folders with a model, data or tests.

```bash
python -m trl_msl.experiments.gpu_kit --output_dir outputs/kit --folders outputs/smollm2 data/Book tests benchmarks
```

Upload the parts in `output_dir` in any order, and run `python kit/unpack.py` there, which needs no other file.
"""

import gzip
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from ..scripts.command_line import command


CHECKOUT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@dataclass
class KitArguments:
    """
    Arguments of this command.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/kit"`):
            Folder for the parts, their checksums, `unpack.py` and `run_rows.sh`; it must not exist yet.
        folders (`list[str]`, *optional*, defaults to `[]`):
            Folders to pack: models, data, tests. Those below the current folder keep their paths, so that the same
            commands name them; others are packed by their last name.
        part_size (`int`, *optional*, defaults to `60`):
            Size of a part in MB.
        wheels (`str`, *optional*):
            Folder of wheels. If it does not exist yet, those downloaded are kept there.
        present (`list[str]`, *optional*):
            Packages that the machine has, as `NAME==VERSION`, which are not packed. Defaults to the version of PyTorch
            that is installed here.
        python_version (`str`, *optional*, defaults to `"3.12"`):
            The machine's version of Python.
        machine (`str`, *optional*, defaults to `"x86_64"`):
            What `uname -m` prints there.
    """

    output_dir: str = field(default="outputs/kit", metadata={"help": "Folder to write the kit into."})
    folders: list[str] = field(default_factory=list, metadata={"help": "Folders to pack: models, data, tests."})
    part_size: int = field(default=60, metadata={"help": "Size of a part in MB."})
    wheels: str | None = field(default=None, metadata={"help": "Folder of wheels; they are downloaded if it is new."})
    present: list[str] = field(
        default_factory=lambda: [f"torch=={importlib.metadata.version('torch').split('+')[0]}"],
        metadata={"help": "Packages that the machine has, as NAME==VERSION; PyTorch by default."},
    )
    python_version: str = field(default="3.12", metadata={"help": "The machine's version of Python."})
    machine: str = field(default="x86_64", metadata={"help": "What uname -m prints there."})


def main(args: KitArguments) -> None:
    output_dir = Path(args.output_dir)
    if output_dir.exists():
        raise ValueError(f"`output_dir` = {args.output_dir!r} exists: remove it to pack again.")
    if args.part_size < 1:
        raise ValueError(f"`part_size` = {args.part_size} must be at least 1 MB.")
    if not (CHECKOUT / "pyproject.toml").exists():
        raise ValueError("the kit contains trl_msl as it is in a checkout of its repository: run this command there.")
    if args.wheels and Path(args.wheels).exists() and not any(Path(args.wheels).glob("*.whl")):
        raise ValueError(f"`wheels` = {args.wheels!r} has no wheels: remove it, and they are downloaded.")
    if wrong := [package for package in args.present if "==" not in package]:
        raise ValueError(f"`present` has {wrong[0]!r}: write NAME==VERSION.")
    folders = name_folders(args.folders)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".kit-") as name:
        place = Path(name)
        own = build_wheel(CHECKOUT, place)
        wheels = Path(args.wheels or place / "wheels")
        if not wheels.exists():
            download(own, args, place / "download")
            shutil.move(place / "download", wheels)
        files = {f"wheels/{path.name}": path for path in sorted(wheels.glob("*.whl")) if path.name != own.name}
        # Least likely to change first: parts before a change stay as they are, and need no second upload
        archive(files | folders | {f"wheels/{own.name}": own}, place / "kit.tar.gz")
        kit = place / "kit"
        kit.mkdir()
        split(place / "kit.tar.gz", kit, args.part_size * 10**6)
        for script, copy in (("unpack_kit.py", "unpack.py"), ("run_rows.sh", "run_rows.sh")):
            shutil.copy(Path(__file__).with_name(script), kit / copy)
        kit.replace(output_dir)
    for path in sorted(output_dir.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")


def name_folders(folders: list[str]) -> dict[str, Path]:
    """The folders by their names in the kit."""
    named: dict[str, Path] = {}
    for folder in folders:
        path, here = Path(folder).absolute(), Path.cwd()
        name = path.relative_to(here).as_posix() if here in path.parents and ".." not in path.parts else path.name
        if not path.is_dir():
            raise ValueError(f"`folders` has {folder!r}, which is no folder.")
        if not name or name in named or name.split("/")[0] in ("wheels", "venv"):
            raise ValueError(f"`folders` has {folder!r}, whose name in the kit, {name!r}, is taken: rename it.")
        named[name] = path
    return named


def build_wheel(checkout: Path, folder: Path) -> Path:
    """
    Build the wheel of trl_msl offline, with the setuptools that is installed, into `folder`.

    From a copy, so that no `build` folder is left in the checkout, nor one from there gets into the wheel.
    """
    with tempfile.TemporaryDirectory() as name:
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(checkout / file, name)
        shutil.copytree(checkout / "trl_msl", f"{name}/trl_msl", ignore=shutil.ignore_patterns("__pycache__"))
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
        if subprocess.run([*PIP, "wheel", name, *options]).returncode:
            raise ValueError('pip could not build the wheel of trl_msl: pip install "setuptools>=77".')
    [wheel] = folder.glob("trl_msl-*.whl")
    return wheel


def download(own: Path, args: KitArguments, folder: Path) -> None:
    """
    Download the wheels of all that trl_msl requires, with its extra `dev`, for the other machine.

    For each package in `present` pip is given an empty wheel of that version, so that it looks for versions of the
    others that fit, and downloads neither that package nor what only that package requires.
    """
    platforms = [f"manylinux_2_{minor}_{args.machine}" for minor in range(28, 4, -1)]  # PyTorch itself needs 2.28
    platforms += [f"manylinux{year}_{args.machine}" for year in (2014, 2010, 1)]
    options = ["--only-binary", ":all:", "--python-version", args.python_version, "--dest", str(folder)]
    options += [option for platform in platforms for option in ("--platform", platform)]
    names = {package.split("==")[0] for package in args.present}
    with tempfile.TemporaryDirectory() as name:
        empty = [write_empty_wheel(Path(name), package) for package in args.present]
        tested = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints = Path(name, "constraints.txt")
        constraints.write_text(
            "\n".join(line for line in tested if line.split("==")[0] not in names), encoding="utf-8"
        )
        options += ["--constraint", str(constraints)]
        if subprocess.run([*PIP, "download", "--quiet", f"{own}[dev]", *map(str, empty), *options]).returncode:
            raise ValueError("pip could not download what trl_msl requires: pass a folder that has it as `wheels`.")
    for path in empty:
        (folder / path.name).unlink()


def write_empty_wheel(folder: Path, package: str) -> Path:
    """A wheel with nothing but a name and a version."""
    name, version = package.split("==")
    info = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{info}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}.dist-info/RECORD", "")
    return Path(wheel.filename)


def archive(files: dict[str, Path], path: Path) -> None:
    """A compressed tar of files and folders by their names in it. Links are followed, as to the Hub's cache."""
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", dereference=True) as tar,
    ):
        for name, source in files.items():
            tar.add(source, name, filter=lambda entry: None if "__pycache__" in entry.name else entry)


def split(path: Path, folder: Path, part_size: int) -> None:
    """Split a file into parts in `folder`, with their checksums in the format of `sha256sum`."""
    sums = []
    with open(path, "rb") as file:
        while data := file.read(part_size):
            part = folder / f"part-{len(sums):03}"
            part.write_bytes(data)
            sums.append(f"{hashlib.sha256(data).hexdigest()}  {part.name}\n")
    (folder / "SHA256SUMS").write_text("".join(sums))


run = command(main)


if __name__ == "__main__":
    run()

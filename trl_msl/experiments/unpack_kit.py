# SPDX-License-Identifier: Apache-2.0
"""
Unpack a kit made by `gpu_kit` and install what it contains: `python kit/unpack.py [FOLDER]`, again when more parts
have arrived. This file is copied into the kit, and needs no package.

`FOLDER`, by default the current one, then holds the folders that were packed, `wheels`, and the environment `venv`.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace


def main(kit: Path, folder: Path) -> str | None:
    """Unpack, and return what is wrong, or `None`."""
    sums, done = kit / "SHA256SUMS", folder / "venv" / "kit"
    if not sums.exists():
        return f"missing: {sums.name}"
    if not (done.exists() and done.read_bytes() == sums.read_bytes()):
        expected = {name: digest for digest, name in map(str.split, sums.read_text().splitlines())}
        missing = [name for name in expected if not (kit / name).exists()]
        damaged = [name for name in expected if name not in missing and digest_of(kit / name) != expected[name]]
        if missing or damaged:
            found = {"missing": missing, "damaged, upload again": damaged}
            return "\n".join(f"{what}: {' '.join(names)}" for what, names in found.items() if names)
        folder.mkdir(parents=True, exist_ok=True)
        chunks = (chunk for name in expected for chunk in read_chunks(kit / name))
        joined = SimpleNamespace(read=lambda size: next(chunks, b""))  # tarfile takes chunks of any size
        with tarfile.open(fileobj=joined, mode="r|gz") as tar:
            tar.extractall(folder, filter="data")
        install(folder)
        done.write_bytes(sums.read_bytes())
    environment = folder.absolute() / "venv"
    print(f"Unpacked. Next:\n  source {environment}/bin/activate\n  trl-msl --help")
    print(f"  bash {kit.absolute()}/run_rows.sh COMMANDS.txt SECONDS  # runs a file's commands, one a line")
    return None


def read_chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def install(folder: Path) -> None:
    """Make `venv`, which sees the packages of this Python, and install into it what they lack."""
    with_pip = importlib.util.find_spec("pip") is None  # else that of this Python is seen, too
    venv.create(folder / "venv", system_site_packages=True, symlinks=True, with_pip=with_pip)
    python = str(folder / "venv" / "bin" / "python")
    # If this Python is itself that of an environment, the new one sees only those of the Python below
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    (site / "kit.pth").write_text("\n".join(paths))
    for earlier in site.glob("trl_msl*"):  # pip would keep one of the same version, but the checkout may have changed
        shutil.rmtree(earlier)
    [own] = (folder / "wheels").glob("trl_msl-*.whl")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--find-links", str(folder / "wheels")]
    if subprocess.run([python, "-m", "pip", "install", *options, f"{own}[dev]"]).returncode:
        sys.exit(f"pip could not install all wheels. This is Python {sys.version.split()[0]}: is the kit made for it?")


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, Path(*sys.argv[1:2])))

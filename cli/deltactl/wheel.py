"""Delta's own wheel, made of what is installed: an image gets the very code that wrote its context.

From a registry it could be another one, and a clone that is installed in place has no wheel at all.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path

DISTRIBUTION = "delta-sync"
PACKAGES = ("delta_debezium", "delta_schemas", "delta_sync", "deltactl")
WHEEL = "Wheel-Version: 1.0\nGenerator: deltactl\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that an archive can say: same code, same bytes


def own_wheel() -> tuple[str, bytes]:
    """Return the wheel's file name and its content."""
    installed = distribution(DISTRIBUTION)
    metadata = {name: installed.read_text(name) or "" for name in ("METADATA", "entry_points.txt")}
    return wheel(f"{DISTRIBUTION.replace('-', '_')}-{installed.version}", _code(), metadata)


def sources(modules: Sequence[str]) -> dict[str, bytes]:
    """Return the files of some of Delta's modules, by path; their packages are empty: only these can be imported."""
    files: dict[str, bytes] = {}
    for module in modules:
        package, _, name = module.rpartition(".")
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        files[f"{package}/__init__.py"] = b""
        files[f"{package}/{name}.py"] = (Path(spec.origin).parent / f"{name}.py").read_bytes()
    return files


def wheel(stem: str, code: Mapping[str, bytes], metadata: Mapping[str, str]) -> tuple[str, bytes]:
    """Return a pure wheel of these files, by their paths in it: same files, same bytes. Pure."""
    info = f"{stem}.dist-info"
    files = dict(sorted(code.items()))
    files |= {f"{info}/{name}": text.encode() for name, text in sorted(metadata.items())}
    files[f"{info}/WHEEL"] = WHEEL.encode()
    record = "".join(f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as target:  # another zlib would compress to other bytes
        for path, content in files.items():
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr = 0o100644 << 16
            target.writestr(entry, content)
    return f"{stem}-py3-none-any.whl", archive.getvalue()


def _code() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None, package
        assert spec.origin is not None, package
        root = Path(spec.origin).parent
        for file in sorted(root.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                found[f"{package}/{file.relative_to(root).as_posix()}"] = file.read_bytes()
    return found


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

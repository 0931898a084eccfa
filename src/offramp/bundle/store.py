"""A bundle's directory: files that are called by their checksum, and a manifest that names them.

A file is never written over: what changed has another checksum and so another name, and the manifest takes its place in
one rename. So an interrupted save leaves the old bundle whole, and a policy is swapped without touching the weights.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.artefacts import clear_partial, filled, read_json, removed_if_left, write_json
from offramp.errors import FormatError

__all__ = ["KIND", "MANIFEST", "VERSION", "Entry", "Manifest", "read_manifest", "sha256", "write_store"]

KIND, VERSION, MANIFEST = "offramp.bundle", 1, "manifest.json"
LARGEST_MANIFEST = 16 * 2**20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.[0-9a-f]{12}(\.[a-z0-9]{1,16})?")
ROLE = re.compile(r"[a-z]+(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?")

Write = Callable[[Path], Any]


@dataclass(frozen=True)
class Entry:
    """One file of a bundle: its name in the directory, its SHA-256 in hex, its size."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. `files` has an entry for each role, such as "weights" or "policies/beem-a"."""

    folder: Path
    files: Mapping[str, Entry]
    fields: Mapping[str, Any]

    def path(self, role: str) -> Path:
        """The file of a role, whose size and checksum are right.

        Raises:
            FormatError: there is no such file, or it is not the one that was written.
        """
        entry = self.files.get(role)
        if entry is None:
            raise FormatError(f"{self.folder} is a damaged bundle: its manifest names no {role}. Copy it again.")
        path = self.folder / entry.name
        if not path.is_file():
            raise FormatError(f"{self.folder} is incomplete: {entry.name} is missing. Copy the whole folder again.")
        size = path.stat().st_size
        if size != entry.size:
            what = "truncated" if size < entry.size else "not the one that was written"
            raise FormatError(f"{path} is {what}: {size} bytes, expected {entry.size}. Copy the whole folder again.")
        if sha256(path) != entry.sha256:
            raise FormatError(f"{path} is damaged: its checksum is not the manifest's. Copy the whole folder again.")
        return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_store(folder: str | Path, writers: Mapping[str, tuple[str, Write]], fields: Mapping[str, Any]) -> Path:
    """The folder, after the files and the manifest were written to it.

    A new folder is filled under a temporary name and renamed. In one that holds a bundle, files that are new are added,
    the manifest is replaced in one rename, and then what no manifest names any more is removed.

    Args:
        writers: role -> (file name such as "weights.safetensors", what fills a file).
        fields: JSON values for the manifest.

    Raises:
        FormatError: the folder exists, is not empty, and is no bundle.
    """
    folder = Path(folder)
    clear_partial(folder)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file; a bundle is a folder. Give another name.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MANIFEST).is_file():
            raise FormatError(f"{folder} is not empty and holds no bundle. Give another name, or remove it yourself.")
        _fill(folder, writers, fields)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        _fill(partial, writers, fields)
        os.replace(partial, folder)  # also over an empty folder
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def read_manifest(folder: str | Path, *, made_by: str = "`offramp bundle create`") -> Manifest:
    """The manifest of a bundle, checked.

    Args:
        folder: the bundle.
        made_by: what writes such a bundle, for the message where there is none.

    Raises:
        FormatError: the folder is no bundle, its manifest is damaged, or it is from a newer version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"is no bundle: it has no {MANIFEST}"
        raise FormatError(f"{folder} {what}. Write one with {made_by}.")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise FormatError(f"{path} is {path.stat().st_size} bytes, too large for a manifest. Copy the bundle again.")
    value = read_json(path)
    if value.get("kind") != KIND:
        raise FormatError(f"{path} is of kind {str(value.get('kind'))[:80]!r}; expected {KIND!r}.")
    version = value.get("version")
    if version != VERSION:
        newer = type(version) is int and version > VERSION
        cure = "Update Offramp." if newer else "Write the bundle again."
        raise FormatError(f"{path} is a bundle of version {str(version)[:20]}; this Offramp reads {VERSION}. {cure}")
    if set(value) != {"kind", "version", "sha256", "files", "fields"} or value["sha256"] != _seal(value):
        raise FormatError(f"{path} is damaged: it does not have its own checksum. Copy the bundle again.")
    try:
        files = {role: Entry(**entry) for role, entry in value["files"].items()}
        good = all(_is_entry(role, entry) for role, entry in files.items()) and isinstance(value["fields"], dict)
    except (TypeError, AttributeError):
        good = False
    if not good:
        raise FormatError(f"{path} is damaged: its list of files is not one. Copy the bundle again.")
    return Manifest(folder, files, value["fields"])


def _is_entry(role: str, entry: Entry) -> bool:
    return (
        bool(ROLE.fullmatch(role))
        and isinstance(entry.name, str)
        and bool(NAME.fullmatch(entry.name))
        and isinstance(entry.sha256, str)
        and type(entry.size) is int
    )


def _seal(value: Mapping[str, Any]) -> str:
    """The checksum of a manifest, over all of it but the checksum."""
    rest = {key: part for key, part in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _fill(folder: Path, writers: Mapping[str, tuple[str, Write]], fields: Mapping[str, Any]) -> None:
    files = {role: _add(folder, name, write) for role, (name, write) in writers.items()}
    entries = {role: {"name": entry.name, "sha256": entry.sha256, "size": entry.size} for role, entry in files.items()}
    value: dict[str, Any] = {"kind": KIND, "version": VERSION, "files": entries, "fields": dict(fields)}
    value = json.loads(json.dumps(value, allow_nan=False))
    _sync(folder)
    write_json(folder / MANIFEST, {**value, "sha256": _seal(value)})
    _sync(folder)
    named = {entry.name for entry in files.values()}
    for path in folder.iterdir():  # files of ours that nothing names any more; whatever else lies here stays
        if not removed_if_left(path) and path.name not in named and NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _add(folder: Path, name: str, write: Write) -> Entry:
    """The entry of a file, after it was written under its checksum's name."""
    stem, dot, suffix = name.partition(".")
    with filled(folder / name, write) as partial:
        digest = sha256(partial)
        entry = Entry(f"{stem}.{digest[:12]}{dot}{suffix}", digest, partial.stat().st_size)
        path = folder / entry.name
        if not (path.is_file() and path.stat().st_size == entry.size and sha256(path) == digest):
            os.replace(partial, path)
    return entry


def _sync(folder: Path) -> None:
    """Nothing; the names in a folder are on the disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # not every system opens folders
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)

"""Upload and download bundles on the Hugging Face hub; the subcommands `push` and `pull`.

A download fetches only the files of a bundle, and skips TorchScript, which is code, unless trusted. The files are then
compared with the checksums in export.json.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from varitok import UserError

from .bundle import read_json, sha256

__all__ = ["download", "pull", "push"]

DATA = (
    "README.md",
    "config.json",
    "export.json",
    "golden.safetensors",
    "model.safetensors",
    "onnx/*.onnx",
    "prior/config.json",
    "prior/frequencies.npy",
    "prior/prior_model.onnx",
    "weights.bin",
)
CODE = ("codec.ts",)


def push(words: Sequence[str]) -> None:
    """Run `varitok push`.

    Raises:
        UserError: The folder is not a bundle, or the hub rejects the upload.
    """
    parser = argparse.ArgumentParser(
        "varitok push",
        description="Upload a bundle to the Hugging Face hub; log in first (hf auth login, or set HF_TOKEN).",
        epilog="for example: varitok push tokenizer OWNER/NAME --private",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository; created if missing")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--message", default="Add a tokenizer of varitok", help="commit message; default: %(default)s")
    options = parser.parse_args(words)
    _verify(options.bundle)
    api = _hub().HfApi()

    def send() -> Any:
        api.create_repo(options.name, private=options.private, exist_ok=True)
        return api.upload_folder(
            repo_id=options.name,
            folder_path=str(options.bundle),
            allow_patterns=[*DATA, *CODE],
            commit_message=options.message,
        )

    print(f"{options.bundle}: uploaded to {_ask(options.name, send)}")


def pull(words: Sequence[str]) -> None:
    """Run `varitok pull`.

    Raises:
        UserError: The repository doesn't exist or has no bundle, or a checksum differs.
    """
    parser = argparse.ArgumentParser(
        "varitok pull",
        description="Download a bundle from the Hugging Face hub and verify its checksums.",
        epilog="for example: varitok pull OWNER/NAME --out tokenizer",
    )
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository; OWNER/NAME@REVISION for another revision")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder; NAME by default")
    parser.add_argument("--trust", action="store_true", help="also download TorchScript, which is code")
    options = parser.parse_args(words)
    folder = options.out or Path(options.name.partition("@")[0].rpartition("/")[2])
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: already exists; give another --out")
    download(options.name, folder, options.trust)
    print(f"{folder}: every file matches its checksum; load it by varitok.load")


def download(name: str, folder: Path | None = None, trust: bool = False) -> Path:
    """Download a repository's bundle and verify its checksums.

    Args:
        name: `OWNER/NAME` or `OWNER/NAME@REVISION`.
        folder: Destination; None: the hub's cache.
        trust: Download TorchScript too.

    Returns:
        The bundle's folder.

    Raises:
        UserError: The repository doesn't exist or has no bundle, or a checksum differs.
    """
    repository, _, revision = name.partition("@")
    hub = _hub()
    patterns = [*DATA, *(CODE if trust else ())]
    options = {"revision": revision or None, "allow_patterns": patterns, "local_dir": folder and str(folder)}
    found = Path(_ask(name, lambda: hub.snapshot_download(repository, **options)))
    if not (found / "export.json").is_file():
        raise UserError(f"{name}: this repository has no bundle of varitok (export.json)")
    _verify(found)
    return found


def _hub() -> Any:
    try:
        import huggingface_hub  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError("the hub needs the package huggingface-hub; pip install 'varitok[hub]'") from error
    return huggingface_hub


def _ask(name: str, call: Callable[[], Any]) -> Any:
    """Return `call()`, a request to the hub; raise its errors as one line."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # from the hub, HTTP or the disk
        kind = type(error).__name__
        hints = {
            "RepositoryNotFoundError": "there is no such repository, or it is private; log in with hf auth login",
            "RevisionNotFoundError": "there is no such revision",
            "LocalTokenNotFoundError": "you are not logged in; run hf auth login, or set HF_TOKEN",
            "HFValidationError": "not a repository's name; it has the form OWNER/NAME",
            "LocalEntryNotFoundError": "the hub can't be reached, and its cache here lacks the files",
            "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set; unset it to use the hub",
        }
        lines = str(error).strip().splitlines()
        raise UserError(f"{name}: {hints.get(kind, f'the hub failed ({lines[0] if lines else kind})')}") from error


def _verify(folder: Path) -> None:
    """Compare the files with the checksums in export.json."""
    files = read_json(folder / "export.json").get("files")
    if not isinstance(files, dict) or "config.json" not in files:
        raise UserError(f"{folder}: not a bundle of varitok")
    for name, entry in files.items():
        path, known = folder / name, entry.get("sha256") if isinstance(entry, dict) else None
        if path.is_file() and folder.resolve() in path.resolve().parents and sha256(path) != known:
            raise UserError(f"{path}: differs from its checksum; download the bundle again")

"""Checks for incompatible and for malicious versions of libraries.

This module imports the standard library only, so that a bad version is reported before its import fails.
"""

import re
import sys
from collections.abc import Mapping
from importlib import metadata

__all__ = ["installed_versions", "mistakes", "require_good"]

# Compiled extensions must match: torch 2.N needs torchvision 0.(N + 15), and torchaudio 2.11, its last release.
TORCH = (2, 11), (2, 14)
AHEAD = 15
AUDIO = (2, 11)
MALICIOUS = {"pytorch-lightning": ("2.6.2", "2.6.3"), "lightning": ("2.6.2", "2.6.3")}
PACKAGES = ("pytorch-lightning", "lightning", "hydra-core", "omegaconf", "torch", "torchvision", "torchaudio")


def require_good() -> None:
    """Exit with one line and status 2 if an installed version is known to be bad."""
    if found := mistakes(installed_versions()):
        print(f"error: {found[0]}", file=sys.stderr)
        sys.exit(2)


def installed_versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Return the versions of the installed packages."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def mistakes(versions: Mapping[str, str], python: tuple[int, int] = sys.version_info[:2]) -> list[str]:
    """List a message with the remedy for each version that is known to be bad."""
    found = [
        f"{name} {versions[name]} is a malicious upload: remove it, change every secret that this machine has seen,"
        f" then pip install '{name}>=2.6.4'"
        for name, bad in MALICIOUS.items()
        if versions.get(name) in bad
    ]
    if not (3, 10) <= python < (3, 14):
        found.append(f"Python {python[0]}.{python[1]}: Hydra 1.3 runs on 3.10 to 3.13; take one of these")
    if "omegaconf" in versions and _parts(versions["omegaconf"]) >= (2, 4):
        found.append(f"omegaconf {versions['omegaconf']}: Hydra 1.3 does not work with it; pip install 'omegaconf<2.4'")
    return found + _torch_mistakes(versions)


def _torch_mistakes(versions: Mapping[str, str]) -> list[str]:
    if "torch" not in versions:
        return []
    torch = versions["torch"]
    release = _parts(torch)
    if not TORCH[0] <= release <= TORCH[1]:
        least, most = (minor for _, minor in TORCH)
        return [f"torch {torch}: varitok runs on 2.{least} to 2.{most}; pip install 'torch>=2.{least},<2.{most + 1}'"]
    found = []
    for name, wanted in (("torchvision", (0, release[1] + AHEAD)), ("torchaudio", AUDIO)):
        there = versions.get(name)
        if there is not None and _parts(there) != wanted:
            text = ".".join(map(str, wanted))
            found.append(f"{name} {there} is not made for torch {torch}; pip install '{name}=={text}.*'")
        # Wheels of torch's own index name their build, such as +cpu, in the version.
        elif there is not None and torch.endswith("+cpu") and not there.endswith("+cpu"):
            found.append(f"{name} {there} does not load beside torch {torch}; install both from the same index")
    return found


def _parts(version: str) -> tuple[int, int]:
    """Return a version's first two numbers."""
    first, second, *_ = [*map(int, re.findall(r"\d+", version)), 0, 0]
    return first, second

"""Weights of the networks that metrics look through: found in the usual caches, or named with their address."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

# Where clean-fid downloads to.
CLEAN_FID = Path("." if os.name == "nt" else "/tmp")


class MissingWeightsError(FileNotFoundError):
    """Weights are not on this machine. The text says which, where they are to be had and where to put them."""


class Found(NamedTuple):
    """Weights on disk. path: the file, or a repository's folder.  sha256: of the file of weights."""

    path: Path
    sha256: str


@dataclass(frozen=True)
class WeightsFile:
    """One published file. sha256: all 64 digits, or the first that its publisher states.  megabytes: of its size.

    aliases: other names under which packages publish or keep the same bytes.
    """

    name: str
    url: str
    sha256: str
    megabytes: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repository:
    """A model of the Hugging Face hub. files: what must be there.  weights: and one of these, the first by choice.

    cache: where a package of its own keeps it.
    """

    id: str
    files: tuple[str, ...]
    megabytes: int
    weights: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    cache: Path | None = None

    def found_in(self, folder: Path) -> Found | None:
        """What `folder` has of it: None unless it is all."""
        weights = [folder / name for name in self.weights if (folder / name).is_file()]
        if not all((folder / file).is_file() for file in self.files) or (self.weights and not weights):
            return None
        return Found(folder, sha256_of(weights[0] if weights else folder / self.files[0]))


@dataclass(frozen=True)
class Weights:
    """Where to look for weights. folder: the user's own, first.  offline: nothing is downloaded.

    After the folder come torch hub's checkpoints, the hub's cache, and the folder that clean-fid downloads to.
    """

    folder: Path | None = None
    offline: bool = False

    def find(self, file: WeightsFile, used_by: str) -> Found:
        """Return the file, downloading it (which is logged as a warning) where it is not here and may be.

        Raises:
            MissingWeightsError: it is nowhere, and offline or its address does not answer.
            ValueError: a file of this name has other contents.
        """
        for path in self._places(file):
            if path.is_file():
                return Found(path, _checked_sha256(path, file))
        if self.offline:
            raise self._missing(file, used_by, "downloads are off")
        return self._download(file, used_by)

    def find_own(self, name: str, used_by: str) -> Found:
        """Return a file of the user's folder that is nobody's standard, whatever it contains.

        Raises:
            MissingWeightsError: there is no such file, or no folder.
        """
        if self.folder is None or not (self.folder / name).is_file():
            where = f"{self.folder} has no such file" if self.folder else "no folder of weights was named"
            raise MissingWeightsError(f"{used_by} needs {name}, weights of your own: {where}; see --weights DIR")
        return Found(self.folder / name, sha256_of(self.folder / name))

    def repository(self, repository: Repository, used_by: str) -> Found:
        """Return the folder of a hub's repository: `folder/<owner>/<name>`, or in its own or the hub's cache.

        Raises:
            MissingWeightsError: it is nowhere, and offline or the hub does not answer.
        """
        if self.folder and (found := repository.found_in(self.folder / repository.id)):
            return found
        if repository.cache and (found := repository.found_in(repository.cache)):
            return found
        if found := _in_hub_cache(repository):
            return found
        if self.offline:
            raise self._missing_repository(repository, used_by, "downloads are off")
        return self._download_repository(repository, used_by)

    def _places(self, file: WeightsFile) -> Iterator[Path]:
        for folder in (self.folder, _checkpoints(), CLEAN_FID):
            if folder is not None:
                yield from (folder / name for name in (file.name, *file.aliases))

    def _download(self, file: WeightsFile, used_by: str) -> Found:
        from torch.hub import download_url_to_file

        path = _checkpoints() / file.name
        logger.warning("%s: downloading %s (%d MB) to %s", used_by, file.url, file.megabytes, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(file.url, str(path), hash_prefix=file.sha256)
        except (OSError, RuntimeError) as error:  # no network; other contents
            raise self._missing(file, used_by, f"the download failed: {error}") from error
        return Found(path, sha256_of(path))

    def _download_repository(self, repository: Repository, used_by: str) -> Found:
        from huggingface_hub import snapshot_download

        logger.warning("%s: downloading %s (%d MB) from the hub", used_by, repository.id, repository.megabytes)
        why = "it lacks " + " or ".join(repository.weights or repository.files)
        for weights in repository.weights or ("",):
            try:
                patterns = ["*.json", "*.txt", weights]
                folder = Path(snapshot_download(repository.id, allow_patterns=patterns))
            except OSError as error:  # the client's errors, and those of the network
                why = f"the download failed: {error}"
                break
            if found := repository.found_in(folder):
                return found
        raise self._missing_repository(repository, used_by, why)

    def _missing(self, file: WeightsFile, used_by: str, why: str) -> MissingWeightsError:
        return MissingWeightsError(
            f"{used_by} needs {file.name}, which is not here ({why}): download {file.url} ({file.megabytes} MB, sha256 "
            f"{file.sha256}) and put it into {self.folder or _checkpoints()}, or name its folder with --weights DIR"
        )

    def _missing_repository(self, repository: Repository, used_by: str, why: str) -> MissingWeightsError:
        needed = ", ".join((*repository.weights[:1], *repository.files))
        place = (self.folder or Path("DIR")) / repository.id
        return MissingWeightsError(
            f"{used_by} needs the model {repository.id}, which is not here ({why}): download {needed} "
            f"({repository.megabytes} MB) from https://huggingface.co/{repository.id} "
            f"into {place}, and name {self.folder or 'DIR'} with --weights"
        )


def _in_hub_cache(repository: Repository) -> Found | None:
    from huggingface_hub import snapshot_download

    try:
        return repository.found_in(Path(snapshot_download(repository.id, local_files_only=True)))
    except FileNotFoundError:  # the client's word for a cache without it
        return None


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _checked_sha256(path: Path, file: WeightsFile) -> str:
    found = sha256_of(path)
    if not found.startswith(file.sha256):
        raise ValueError(
            f"{path} is not the published {file.name}: its sha256 is {found}, expected {file.sha256}...; "
            f"delete it and download {file.url}"
        )
    return found


def _checkpoints() -> Path:
    import torch.hub

    return Path(torch.hub.get_dir()) / "checkpoints"

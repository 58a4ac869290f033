"""Downloads from Torch Hub and the Hugging Face hub into their caches, which are used without asking the network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from detr_fast.checkpoint.errors import CheckpointError, fail, listed, reason
from detr_fast.checkpoint.weights import CONFIG_FILE, HUB_WEIGHT_FILES, shard_names

# facebookresearch/detr's hubconf.py; the last 8 digits of a name are how its SHA-256 begins
TORCH_HUB_URL = "https://dl.fbaipublicfiles.com/detr/"
TORCH_HUB_FILES = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    "detr_resnet50_panoptic": "detr-r50-panoptic-00ce5173.pth",
    "detr_resnet50_dc5_panoptic": "detr-r50-dc5-panoptic-da08f1b1.pth",
    "detr_resnet101_panoptic": "detr-r101-panoptic-40021d53.pth",
}
TIMEOUT = 10  # seconds until a server that does not answer counts as no network

_WAYS_ON = "give the path of a local folder or file instead, or the small model shapes, which needs no network"


def torch_hub_file(name: str) -> Path:
    """A checkpoint of facebookresearch/detr in Torch Hub's cache, downloaded if missing; its hash is verified."""
    import http.client
    import urllib.request

    file = TORCH_HUB_FILES[name]
    prefix = file.removesuffix(".pth").rpartition("-")[2]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / file
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # torch's download has no timeout, so whether the server answers is asked first
            request = urllib.request.Request(TORCH_HUB_URL + file, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
            torch.hub.download_url_to_file(TORCH_HUB_URL + file, str(path), hash_prefix=prefix, progress=True)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            raise CheckpointError(
                f"{name}: cannot download {TORCH_HUB_URL}{file} ({reason(error)}); put it at {path}, or {_WAYS_ON}"
            ) from error
    sha256 = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(2**20):
            sha256.update(chunk)
    digest = sha256.hexdigest()
    if not digest.startswith(prefix):
        fail(name, f"{path} has SHA-256 {digest[:8]}..., not {prefix}...: delete it to download it again")
    return path


def hub_folder(repo: str, revision: str | None) -> Path:
    """The folder of a model in the Hugging Face hub's cache, with config.json and one kind of weights; the network
    completes it where the cache lacks something.

    Raises:
        CheckpointError: no such model, no network, or no weights in it.
    """
    try:
        folder = _folder(repo, partial(_cached_file, repo, revision=revision, cache_dir=None))
        folder = folder or _folder(repo, partial(hub_file, repo, revision=revision))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_WAYS_ON}") from error
    if folder is None:
        names = listed(HUB_WEIGHT_FILES, 9)
        fail(repo, f"this model on the Hugging Face hub has no {CONFIG_FILE} or none of {names}; {_WAYS_ON}")
    return folder


def _folder(repo: str, get: Callable[[str], Path | None]) -> Path | None:
    """The folder of config.json and the first kind of weights for which `get` has all files; None without one."""
    config = get(CONFIG_FILE)
    weights = next((path for name in HUB_WEIGHT_FILES if (path := get(name)) is not None), None) if config else None
    if config is None or weights is None:
        return None
    shards = shard_names(weights, repo) if weights.name.endswith(".index.json") else []
    return config.parent if all(get(name) is not None for name in shards) else None


def hub_file(
    repo: str,
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path | None:
    """A file of a model on the Hugging Face hub, from the cache if it is there; None where the model has none.

    Args:
        repo: a hub id, "facebook/detr-resnet-50".
        revision, token, cache_dir, local_files_only, force_download: as for `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: no hub id, no such model, or no network.
    """
    # imported here because it takes longer than the rest of the package together
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        cached = _cached_file(repo, name, revision=revision, cache_dir=cache_dir)
        if cached is not None and not force_download:
            return cached
        if not local_files_only:
            # one request without the retries of a download shows within seconds that there is no network
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=token, timeout=TIMEOUT)
        return Path(
            hf_hub_download(
                repo,
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )
    except Exception as error:  # the hub's HTTP library, and with it its errors, differs between versions
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        problem = f"{_hub_problem(error)} ({reason(error)})"
        raise CheckpointError(f"{repo}: no such folder or file, and {problem}") from error


def _hub_problem(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return "it is no hub id"
    if isinstance(error, HfHubHTTPError):
        return "the Hugging Face hub has no such model or does not give it"
    return "the Hugging Face hub cannot be reached for a model of that name"


def _cached_file(repo: str, name: str, *, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None  # what else it returns says "unknown" or "not on the hub"

"""Pretrained weights of timm's models, from the hub or from its client's cache."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mealfast.errors import UsageError
from mealfast.machine.files import brief, reason
from mealfast.models.spec import ModelSpec


def local_weights(spec: ModelSpec, config: Any) -> dict[str, Any]:
    """Arguments of timm.create_model: {} where the hub answers, else the weights that its client has already cached.

    Without this the client tries for a minute before it gives up, even where the file lies in its cache. `config` is
    timm's of the pretrained weights. Raises UsageError where neither is to be had.
    """
    if not config.hf_hub_id or _hub_answers():
        return {}
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin"):
        path = try_to_load_from_cache(config.hf_hub_id, name)
        if isinstance(path, str):
            return {"pretrained_cfg_overlay": {"file": path}}
    raise no_weights(spec, "the network cannot be reached")


def files(spec: ModelSpec, config: str, weights: Sequence[str]) -> tuple[Path, Path]:
    """`config` and the first of `weights` of the repository that `hf-hub:ORG/NAME[@REVISION]` names, downloaded or from
    the cache of the hub's client. Raises UsageError where they are not to be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = spec.checkpoint.partition("@")
    what, cached_only = f"model spec '{brief(spec.text)}'", not _hub_answers()

    def get(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision or None, local_files_only=cached_only))

    try:
        found = get(config)
        for name in weights:
            try:
                return found, get(name)
            except (EntryNotFoundError, LocalEntryNotFoundError):  # the other one may be there
                continue
    except Exception as error:  # of the client, urllib's and its own among them
        why = "the network cannot be reached" if cached_only else reason(error)
        raise UsageError(
            f"{what}: could not be downloaded ({why}): run where there is a network, or give local-dir:DIR"
        ) from error
    raise UsageError(f"{what}: holds none of {', '.join(weights)}")


def _hub_answers() -> bool:
    """Whether the hub's name resolves; behind a proxy that is the proxy's business."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def no_weights(spec: ModelSpec, reason: str) -> UsageError:
    """The one line for weights that cannot be had."""
    return UsageError(
        f"the weights of {spec.timm_name} could not be downloaded ({reason}): run where there is a network, "
        f"or give a checkpoint file as {spec.timm_name}@FILE"
    )

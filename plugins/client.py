"""What a client learns of a server that guides, from `GET /v1/mavis/objectives`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

START = "`trimtab serve MODEL VALUE_MODEL`, or `VLLM_PLUGINS=mavis vllm serve ...`"


@dataclass(frozen=True)
class Server:
    """What a server says of itself.

    Args:
        url: Ends in `/v1`.
        model: Name that requests call the base model by.
        objectives: What it says of each, by name, in its order.
        defaults: Of requests: `weights` by name, `beta`, `top_k`, and `kl_budget` if there is one.
        logprobs_mode: vLLM's.
    """

    url: str
    model: str
    objectives: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    logprobs_mode: str


def find_server(base_url: str) -> Server:
    """Asks a server for its objectives and its model.

    Raises:
        ValueError: It does not answer, or does not guide. The message says how to start it.
    """
    import httpx

    url = api_url(base_url)
    try:
        with httpx.Client(headers={"Authorization": f"Bearer {api_key()}"}, timeout=30) as client:
            found = client.get(f"{url}/mavis/objectives")
            models = client.get(f"{url}/models")
        if found.status_code == 404:
            raise ValueError(f"the server at {url!r} lists no objectives: start it by {START}")
        said, served = found.raise_for_status().json(), models.raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(
            f"no answer from {url!r} ({error}): give the URL of a server that is up, started by "
            f"{START}; its key, if it has one, is OPENAI_API_KEY"
        ) from error
    return Server(
        url,
        served["data"][0]["id"],
        {objective["name"]: objective for objective in said["objectives"]},
        said["defaults"],
        said["logprobs_mode"],
    )


def api_url(base_url: str) -> str:
    """A server's URL as OpenAI's clients take it, with the `/v1` that it may be given without."""
    return f"{base_url.rstrip('/').removesuffix('/v1')}/v1"


def api_key() -> str:
    """The key that is sent; a server started without one takes any."""
    return os.environ.get("OPENAI_API_KEY", "EMPTY")

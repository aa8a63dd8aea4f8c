"""What vLLM's API server can say of guidance: `VLLM_PLUGINS=mavis vllm serve ...`.

The logits processor is told a request's sampling parameters and nothing else. What a client puts
elsewhere in the body vLLM leaves out without a word, and its answer is unguided: here it is
refused. `GET /v1/mavis/objectives` says what a request may ask for, and the header `x-mavis` of an
answer what it was guided by. An endpoint plugin of vLLM 0.32, which loads it only where
`VLLM_PLUGINS` names it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient

from .metrics import count_refusal, start_at_zero
from .params import GuidanceParams, argument, quote, request_params
from .vllm import Serving, serving

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PATHS = ("/completions", "/responses")  # of requests that sample
# Where clients put what they mean for `vllm_xargs`
CONTAINERS = ("extra_body", "extra_args")
REMEDY = (
    'put it into "vllm_xargs": an OpenAI client sends '
    'extra_body={"vllm_xargs": {"mavis_weights": "…"}}, and JSON has "vllm_xargs" at its top level'
)


class MAVISEndpoint:
    """The entry point `mavis` of the group `vllm.endpoint_plugins`."""

    name = "mavis"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.serving: Serving | None = None  # None where the server has no guidance
        self.vllm_config: VllmConfig | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/v1/mavis/objectives", self.objectives, methods=["GET"])
        app.add_middleware(RequestCheck, endpoint=self)

    async def init_state(
        self, engine_client: EngineClient | None, state: Any, args: Namespace
    ) -> None:
        if engine_client is None:
            return
        config = self.vllm_config = engine_client.vllm_config
        if isinstance(config.additional_config, dict) and "mavis" in config.additional_config:
            self.serving = serving(config)
            start_at_zero(config)

    async def objectives(self) -> JSONResponse:
        """The objectives that this server guides by, with their defaults and origin."""
        if self.serving is None or self.vllm_config is None:
            return _error("this server has no guidance: --additional-config has no 'mavis'", 404)
        # Which says whether log-probabilities are the base model's
        mode = self.vllm_config.model_config.logprobs_mode
        return JSONResponse({**describe(self.serving), "logprobs_mode": mode})


def describe(found: Serving) -> dict[str, Any]:
    """What `GET /v1/mavis/objectives` answers."""
    names = iter(found.objectives)
    objectives = []
    for (_, path), config in zip(found.config.value_models, found.configs):
        scales = config.candidate_scale or [1.0] * len(config.objectives or [])
        made = {k: v for k, v in (config.provenance or {}).items() if k != "command"}
        for scale in scales:
            objectives.append(
                {
                    "name": next(names),
                    "value_model": str(path),
                    "head_type": config.head_type,
                    "base_model": config.base_model,
                    "candidate_scale": scale,
                    "provenance": made,
                }
            )
    return {
        "objectives": objectives,
        "defaults": applied(found.defaults, found.objectives),
        "max_top_k": found.config.max_top_k,
        "versions": {name: version(name) for name in ("trimtab", "vllm", "torch", "transformers")},
    }


def applied(params: GuidanceParams, objectives: tuple[str, ...]) -> dict[str, Any]:
    """A request's parameters by name; of the weights those that are not 0."""
    weights = {name: weight for name, weight in zip(objectives, params.weights) if weight}
    found = {"weights": weights, "beta": params.beta, "top_k": params.top_k}
    return found if params.kl_budget is None else {**found, "kl_budget": params.kl_budget}


def check_body(body: Mapping[str, Any], objectives: tuple[str, ...]) -> None:
    """Checks that a request asks for guidance where it is heard.

    Args:
        body: A completion request, as JSON.
        objectives: Of the server.

    Raises:
        ValueError: It asks elsewhere. The message names the field and the remedy.
    """
    for key in body:
        if _is_ours(key):
            raise ValueError(f"{quote(key)} is ignored at the top level of a request: {REMEDY}")
    for container in CONTAINERS:
        inside = body.get(container)
        if isinstance(inside, Mapping):
            nested = inside.get("vllm_xargs")
            for key in (*inside, *(nested if isinstance(nested, Mapping) else ())):
                if _is_ours(key):
                    raise ValueError(f"{quote(key)} is ignored in {container!r}: {REMEDY}")
    xargs = body.get("vllm_xargs")
    for where in (body, xargs if isinstance(xargs, Mapping) else {}):
        if _names_any(where.get("weights"), objectives):
            raise ValueError(f"'weights' is ignored, it is called 'mavis_weights': {REMEDY}")


def _is_ours(key: str) -> bool:
    """Whether a key is one of ours or meant to be."""
    try:
        return argument(key) is not None
    except ValueError:
        return True


def _names_any(weights: object, objectives: tuple[str, ...]) -> bool:
    if isinstance(weights, str):
        return any(f"{name}=" in weights or f'"{name}"' in weights for name in objectives)
    return isinstance(weights, Mapping) and any(name in weights for name in objectives)


def _error(message: str, status: int) -> JSONResponse:
    kind = "BadRequestError" if status == 400 else "NotFoundError"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status_code=status)


class RequestCheck:
    """ASGI middleware: refuses guidance that is asked for in the wrong place, names what applied.

    Args:
        app: What answers.
        endpoint: Whose configuration counts.
    """

    def __init__(self, app: Any, endpoint: MAVISEndpoint) -> None:
        self.app, self.endpoint = app, endpoint

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        found = self.endpoint.serving
        sampling = scope["type"] == "http" and scope["path"].endswith(PATHS)
        if found is None or not sampling or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        params = found.defaults
        text = b"".join(message.get("body", b"") for message in messages)
        if b"mavis" in text.lower() or b"weights" in text:  # others are not read twice
            try:
                body = json.loads(text)
            except (ValueError, RecursionError):
                body = None  # vLLM says so
            if isinstance(body, Mapping):
                try:
                    check_body(body, found.objectives)
                except ValueError as error:
                    count_refusal(self.endpoint.vllm_config, "misplaced")
                    await _error(str(error), 400)(scope, receive, send)
                    return
                with suppress(ValueError):  # which the processor refuses
                    params = request_params(
                        body.get("vllm_xargs"), found.objectives, params, found.config.max_top_k
                    )

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                told = json.dumps(applied(params, found.objectives)).encode()
                message["headers"] = [*message.get("headers", ()), (b"x-mavis", told)]
            await send(message)

        guided = params.beta and any(params.weights)
        await self.app(scope, replay, answer if guided else send)

"""
title: MAVIS guidance
description: Guides answers of a vLLM server with trimtab's plugin by weights of its objectives.
version: 0.1.0
"""

# A Function of Open WebUI, a filter: paste this file under Admin Panel > Functions, and switch it
# on for the models that such a server serves; other servers may refuse what it adds.

from typing import Any

from pydantic import BaseModel, Field

WEIGHTS = "Weights of the objectives, as name=value,name=value or a JSON object; empty: "
BETA = "Strength of the guidance, 0 or more; empty: "


class Filter:
    """Adds `vllm_xargs` to requests. A user's weights and strength go before the administrator's,
    and those before the server's defaults. The server refuses what it cannot read, by name."""

    class Valves(BaseModel):
        priority: int = Field(0, description="Order among the filters.")
        mavis_weights: str = Field("", description=f"{WEIGHTS}the server's.")
        mavis_beta: float | None = Field(None, ge=0, description=f"{BETA}the server's.")

    class UserValves(BaseModel):
        mavis_weights: str = Field("", description=f"{WEIGHTS}the administrator's.")
        mavis_beta: float | None = Field(None, ge=0, description=f"{BETA}the administrator's.")

    def __init__(self) -> None:
        self.valves = self.Valves()

    def inlet(self, body: dict[str, Any], __user__: dict[str, Any] | None = None) -> dict[str, Any]:
        """The request's body, with the guidance that is asked for."""
        asked: dict[str, Any] = {}
        for valves in (self.valves, (__user__ or {}).get("valves")):
            for name in ("mavis_weights", "mavis_beta"):
                if (value := getattr(valves, name, None)) not in (None, ""):
                    asked[name] = value
        if asked:
            body["vllm_xargs"] = {**asked, **(body.get("vllm_xargs") or {})}
        return body

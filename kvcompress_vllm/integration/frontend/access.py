# SPDX-License-Identifier: Apache-2.0
"""The API key that vLLM's own routes ask for; its middleware guards no others."""

from __future__ import annotations

from argparse import Namespace

from fastapi import HTTPException, Request
from vllm import envs

from kvcompress_vllm.integration.compat import releases


def api_keys(args: Namespace) -> list[str]:
    """As vLLM reads them."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


async def authorized(request: Request) -> None:
    """Refuse who does not have the key, where the server has one.

    Raises:
        HTTPException: 401.
    """
    keys = api_keys(request.app.state.args)
    if not keys:
        return
    if not releases.authentication()(request.app, keys).verify_token(request.headers):
        raise HTTPException(401, "Unauthorized", headers={"WWW-Authenticate": "Bearer"})

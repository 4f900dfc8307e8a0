"""Who comes in: only who brings a key where one is asked for, and with no more than a request may be."""

import secrets
import time

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.settings import Rights, Serving
from deltaw.web.forms import Answer, fault
from deltaw.web.keys import Keys, Tenant

OPEN = {"/", "/health", "/healthz", "/readyz", "/docs", "/openapi.json"}
"""Routes that ask for no key: they say nothing of anybody."""
NOBODY = Tenant("", Rights(personas=()))
"""Who comes without a key, to what is open."""
ASKS = "This server asks for a key: Authorization: Bearer KEY."


class Door:
    """Who comes in: only who brings a key where one is asked for, and with no more than a request may be."""

    def __init__(self, app: ASGIApp, keys: Keys, serving: Serving) -> None:
        self.app, self.keys, self.serving = app, keys, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one in, or say why not, before anything of its body is read."""
        if scope["type"] == "http":
            key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")[len("Bearer ") :]
            tenant = self.keys.of(key) or NOBODY
            if tenant is NOBODY and scope["path"] not in OPEN:
                return await Answer(fault(ASKS, "invalid_api_key"), 401)(scope, receive, send)
            mark = secrets.token_hex(12), int(time.time()), secrets.randbits(32)  # its answer's id, time and seed
            scope.setdefault("state", {}).update(tenant=tenant, mark=mark)
            upload = scope["path"] == "/v1/adapters/upload" and tenant.rights.manage
            receive = _counted(receive, 1e6 * (self.serving.upload_mb if upload else self.serving.body_mb))
        return await self.app(scope, receive, send)


def guarded(app: FastAPI, serving: Serving) -> None:
    """Put the door before a server; at addresses that only this machine has, it answers only to their names.

    Raises:
        UserError: the file of keys cannot be read.
    """
    app.add_middleware(Door, keys=Keys(serving.keys, serving.key), serving=serving)
    if serving.alone:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", serving.host])


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    tenant: Tenant = request.state.tenant
    return tenant


def manages(request: Request) -> None:
    """Only who may manage comes here."""
    if not tenant_of(request).rights.manage:
        raise HTTPException(403, "This key may not manage the server.")


def _counted(receive: Receive, most: float) -> Receive:
    left = most

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"This is more than a request may be: {most / 1e6:g} MB.")
        return message

    return counted

"""How a host answers what the service orders of it, whichever engine is inside."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)


async def reply(work: Callable[[], Awaitable[dict[str, Any]]]) -> JSONResponse:
    """What the work returns; its error as 422 with the reason, for the service to tell."""
    try:
        return JSONResponse(await work())
    except Exception as error:
        logger.exception("an order of the service failed")
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 422)

"""How any host answers a control request of the service."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)


async def reply(work: Callable[[], Awaitable[dict[str, Any]]]) -> JSONResponse:
    """The result of `work`; if it raises, 422 with the reason, which the service reports."""
    try:
        return JSONResponse(await work())
    except Exception as error:
        logger.exception("a control request failed")
        return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 422)

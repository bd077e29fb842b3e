"""What the operator decides about who may come in, with what, and what is written down about it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from service.limits import Limits
from service.telemetry import Telemetry


class Door(BaseModel):
    """Set from the top, read by the ingress.

    ingresses: the processes that clients come in through, which know nothing of one another. A key's tokens a minute
        are divided among them; what it may have open at once, each of them allows.
    api_keys_file: whose keys are let in, as `attendant keys` writes it; without one, everybody is.
    share_prefixes: let requests of different keys find one another's prompts in the cache. It saves work, and lets one
        key learn from the time of an answer what another has asked.
    cors_origins: whose pages a browser lets talk to the service.
    access_log: a file that gets one line of JSON for each request, or "-" for the standard output of the ingress.
        log_prompts: with what was asked.
    limits: what one client may ask for.
    telemetry: where logs and traces go, and what is worth a line.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ingresses: Annotated[int, Field(ge=1)] = 1
    api_keys_file: str | None = None
    share_prefixes: bool = False
    cors_origins: tuple[str, ...] = ()
    access_log: str | None = None
    log_prompts: bool = False
    limits: Limits = Limits()
    telemetry: Telemetry = Telemetry()

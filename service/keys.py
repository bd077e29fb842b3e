"""API keys: who may come in, and how much of the service each may use.

The file holds no key, only a salted SHA-256 of each. That is enough here, where a slow hash would be for passwords: a
key carries 256 random bits, which nobody guesses. It also carries its own id, so that one hash is computed for a
request, however many keys there are.
"""

import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from model.errors import ConfigError
from service.errors import Unauthorized

logger = logging.getLogger(__name__)

PREFIX = "att"
RELOAD_PERIOD_S = 1.0

Digits = Annotated[str, Field(pattern="^[0-9a-f]+$")]


class ApiKey(BaseModel):
    """One key's entry in the file. `service.quota` says what a limit means with several ingresses; None: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Digits
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")]
    salt: Digits
    sha256: Digits
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    expires: AwareDatetime | None = None


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...] = ()


# What a key with an unknown id is compared with, so that it takes as long as one with a known id.
NOBODY = ApiKey(id="0", name="nobody", salt="00" * 16, sha256="00" * 32)


class KeyRing:
    """The keys of a file, read again when it changes. A file that has become unreadable leaves the keys as they were.

    Raises `ConfigError` when the file cannot be read at the start.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signature = _signature(file)
        self._keys = {key.id: key for key in read(file)}
        self._look_again_at = time.monotonic() + RELOAD_PERIOD_S

    def authenticate(self, authorization: str | None) -> ApiKey:
        """The key of an `Authorization` header. Raises `Unauthorized`; it never says which part was wrong."""
        self._reload_if_changed()
        scheme, _, text = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("an API key is needed; send it in the header `Authorization: Bearer <key>`")
        key_id, _, secret = text.strip().removeprefix(f"{PREFIX}-").partition("-")
        key = self._keys.get(key_id, NOBODY)
        matches = hmac.compare_digest(_digest(key.salt, secret), key.sha256)
        if not matches or key is NOBODY:
            raise Unauthorized("this API key is not known here")
        if key.expires is not None and key.expires <= datetime.now(UTC):
            raise Unauthorized(f"this API key has expired on {key.expires:%Y-%m-%d}")
        return key

    def _reload_if_changed(self) -> None:
        now = time.monotonic()
        if now < self._look_again_at:
            return
        self._look_again_at = now + RELOAD_PERIOD_S
        try:
            signature = _signature(self._file)
            if signature != self._signature:
                self._keys = {key.id: key for key in read(self._file)}
                self._signature = signature
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)


def read(file: Path) -> tuple[ApiKey, ...]:
    """The entries of a file of keys. Raises `ConfigError` naming the file and the place."""
    try:
        keys = KeyFile.model_validate_json(file.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"{file}: the API keys cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ConfigError(f"{file}: this is no file of API keys: {place}: {fault['msg']}") from None
    if len({key.id for key in keys}) < len(keys) or len({key.name for key in keys}) < len(keys):
        raise ConfigError(f"{file}: two API keys have the same id or name")
    return keys


def add(
    file: Path,
    name: str,
    *,
    max_concurrent: int | None = None,
    tokens_per_minute: int | None = None,
    expires: datetime | None = None,
) -> str:
    """Make a key, enter it into the file and return it: it cannot be had again. Raises `ConfigError`."""
    keys = read(file) if file.exists() else ()
    if any(key.name == name for key in keys):
        raise ConfigError(f"{file}: there is a key named {name} already; remove it first")
    key_id, salt, secret = secrets.token_hex(6), secrets.token_hex(16), secrets.token_urlsafe(32)
    try:
        entry = ApiKey(
            id=key_id,
            name=name,
            salt=salt,
            sha256=_digest(salt, secret),
            max_concurrent=max_concurrent,
            tokens_per_minute=tokens_per_minute,
            expires=expires,
        )
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise ConfigError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None
    _write(file, [*keys, entry])
    return f"{PREFIX}-{key_id}-{secret}"


def remove(file: Path, name: str) -> None:
    """Take a key out of the file; services that use it refuse the key within a second. Raises `ConfigError`."""
    keys = read(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise ConfigError(f"{file}: there is no key named {name}")
    _write(file, left)


def _write(file: Path, keys: Sequence[ApiKey]) -> None:
    """Replace the file in one go: a service that reads it meanwhile sees the old one or the new one."""
    body = KeyFile(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True)
    try:
        handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=file.name)  # readable by its owner alone
        with os.fdopen(handle, "w") as writer:
            writer.write(body + "\n")
        Path(scratch).replace(file)
    except OSError as error:
        raise ConfigError(f"{file}: the API keys cannot be written: {error.strerror}") from None


def _digest(salt: str, secret: str) -> str:
    return sha256(bytes.fromhex(salt) + secret.encode(errors="replace")).hexdigest()


def _signature(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise ConfigError(f"{file}: the API keys cannot be read: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size, status.st_ino

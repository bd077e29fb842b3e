"""`attendant keys`: makes, lists and removes the API keys of a file."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

keys = typer.Typer(name="keys", help="Make, list and remove API keys.", no_args_is_help=True)

File = Annotated[
    Path, typer.Option("--api-keys-file", envvar="ATTENDANT_API_KEYS_FILE", help="The file that holds them.")
]


@keys.command()
def add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: File,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Requests that it may have open at once.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens, read and written, in a minute.")] = None,
    expires: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="When it ends (UTC).")
    ] = None,
) -> None:
    """Make a key and print it. It is shown this once; the file holds only a hash of it."""
    from service.keys import add

    key = add(
        file,
        name,
        max_concurrent=max_concurrent,
        tokens_per_minute=tokens_per_minute,
        expires=expires.replace(tzinfo=UTC) if expires else None,
    )
    print(key)


@keys.command("list")
def list_(file: File) -> None:
    """Print the name of each key, and its limits."""
    from service.keys import read

    for key in read(file):
        limits = key.model_dump(mode="json", include={"max_concurrent", "tokens_per_minute", "expires"})
        print(key.name, *(f"{name}={value}" for name, value in limits.items() if value is not None))


@keys.command()
def remove(name: Annotated[str, typer.Argument(help="Whose key it is.")], file: File) -> None:
    """Remove a key. A running service refuses it within a second."""
    from service.keys import remove

    remove(file, name)

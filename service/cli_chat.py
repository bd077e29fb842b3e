"""`attendant chat`: a conversation with a running service, in the terminal."""

import contextlib
from contextlib import closing
from typing import Annotated

import typer
from rich.console import Console

from service.client import Client, Conversation, Pace, RequestFailed

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "/new starts a new conversation, /history shows this one, /exit or Ctrl-D ends it; Ctrl-C cuts an answer short."

Url = Annotated[str, typer.Option(help="Where the service is.")]
ApiKey = Annotated[str | None, typer.Option(envvar="ATTENDANT_API_KEY", help="The key that it lets in.")]


def chat(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="What holds for the whole conversation.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
) -> None:
    """Talk to a running service."""
    with contextlib.suppress(ImportError):  # where there is one: arrow keys, and the lines typed before
        import readline  # noqa: F401

    fields = {"max_completion_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with Client(url, api_key) as client:
        talk(Conversation(client, system=system, **fields), Console(highlight=False))


def talk(conversation: Conversation, console: Console) -> None:
    """Read and answer until there is nothing more to read."""
    console.print(HELP, style="dim")
    while True:
        try:
            line = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        match line:
            case "":
                continue
            case "/exit":
                return
            case "/new":
                conversation.forget()
            case "/history":
                for message in conversation.messages:
                    console.print(f"{message['role']}: {message['content']}", markup=False)
            case _ if line.startswith("/"):
                console.print(HELP, style="dim")
            case _:
                answer(conversation, line, console)


def answer(conversation: Conversation, line: str, console: Console) -> None:
    """Print one answer as it comes, and how fast it came. A refusal is printed, and the conversation goes on."""
    pace = Pace()
    try:
        with closing(conversation.say(line, pace)) as parts:
            for part in parts:
                console.print(part, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("\n(cut short)", style="dim")
    except RequestFailed as error:
        console.print(f"\n{error}", style="red", markup=False)
    else:
        console.print(f"\n({pace})", style="dim")

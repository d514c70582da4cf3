"""``gaisnet chat``: a conversation in the terminal, coloured by the body that wrote."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from gaisnet.cli.conversation import Conversation
from gaisnet.cli.display import console, quiet_libraries, told_errors
from gaisnet.cli.options import ServiceOverrides
from gaisnet.cli.serve import opened
from gaisnet.config import RoutingSettings
from gaisnet.errors import ServerRefused
from gaisnet.serving.http.address import read_address
from gaisnet.terminal import safe_line

_COLOURS = {"edge": "green", "cloud": "magenta"}
_NAMES = {"edge": "domain model", "cloud": "foundation model"}
_TEACHING = "/model NAME changes the model, /models lists them, /new forgets what was said, /quit ends it"


def chat(
    place: Annotated[
        str, typer.Argument(metavar="RUN|URL", help="A run's output folder, or where it is served: http://host:port")
    ],
    model: Annotated[str, typer.Option(help="auto, foundation, merged, or a domain.")] = "auto",
    api_keys: Annotated[
        Path | None, typer.Option(show_default="the first of $GAISNET_API_KEYS", help="File whose first key is used.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.0,
    speculate: Annotated[bool, typer.Option("--speculate", help="The DM drafts and the FM checks.")] = False,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help=r"Send each line as a plain prompt instead of a chat message; \n starts a new line.",
        ),
    ] = False,
    overrides: ServiceOverrides = None,
) -> None:
    r"""Talk to a run's models. Green text is the domain model's, magenta the foundation model's.

    RUN is asked where it is served on this machine; if it is not served, it is opened here. API keys go to a URL only.

    With the demo: gaisnet chat runs/demo-... --model auto --plain, then
    Diagnosis: Acute myocarditis, unspecified\nChapter:
    """
    with told_errors():
        from gaisnet.serving.http.callers import first_key

        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        if speculate:
            options["speculate"] = True
        with _address(place, overrides or ()) as (url, by_file):
            key = first_key(api_keys)
            if key is not None and by_file:  # a folder may come from anybody, and so may the address in it
                console.print(f"No API key is sent there; to send it: gaisnet chat {url}", style="dim", highlight=False)
                key = None
            talk = Conversation(url, model, key, options, plain)
            known = talk.models()
            if model not in known:
                raise ServerRefused(url, f"it has no model '{model}', but {', '.join(known)}")
            console.print(f"{model} at {url}. {_TEACHING}.", style="dim", highlight=False)
            _converse(talk)


@contextmanager
def _address(place: str, overrides: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield a server's URL, and whether it came from a file; start a server if there is none."""
    if place.startswith(("http://", "https://")):
        yield place, False
        return
    run = Path(place)
    if (url := read_address(run)) is not None:
        yield url, True
        return
    quiet_libraries()
    from gaisnet.serving.http.callers import ApiKeys

    with opened(run, None, RoutingSettings(), False, ApiKeys(), ("127.0.0.1", 0), overrides) as (_, server):
        with server.in_thread() as here:
            yield here, False


def _converse(talk: Conversation) -> None:
    while True:
        try:
            line = console.input(Text(f"{safe_line(talk.model)}> ", "bold")).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/quit", "/exit"):
            return
        if line:
            _take_line(talk, line)


def _take_line(talk: Conversation, line: str) -> None:
    """Run a command or answer a line; report errors and go on."""
    try:
        if line.startswith("/"):
            _command(talk, *line.split())
        else:
            _answer(talk, line.replace("\\n", "\n") if talk.plain else line)
    except ServerRefused as error:
        console.print(str(error), style="bold red", highlight=False)


def _command(talk: Conversation, name: str, *values: str) -> None:
    match name, values:
        case "/model", (model,):
            if model not in (known := talk.models()):
                raise ServerRefused(talk.url, f"it has no model '{model}', but {', '.join(known)}")
            talk.model = model
        case "/models", ():
            console.print(", ".join(talk.models()), highlight=False)
        case "/new", ():
            talk.turns.clear()
        case _:
            console.print(_TEACHING, style="dim", highlight=False)


def _answer(talk: Conversation, text: str) -> None:
    """Show text as it comes, then who wrote it. Ctrl-C stops it."""
    last: dict[str, Any] = {}
    try:
        for chunk in talk.say(text):
            last = chunk["gaisnet"] or last
            console.print(chunk["text"], style=_COLOURS.get(str(last.get("body"))), end="", highlight=False)
    except KeyboardInterrupt:
        console.print(" broken off", style="dim", end="")
    console.print()
    if last:
        console.print(_who(last), style="dim", highlight=False)


def _who(course: dict[str, Any]) -> str:
    """Name the body that wrote."""
    at, body = course.get("escalated_at"), str(course.get("body"))
    said = f"by the {_NAMES.get(body, 'server')}"
    if isinstance(at, int) and at:
        said = f"by the domain model, and from token {at + 1} on by the foundation model"
    elif at == 0:
        said = "by the foundation model: the domain model was not sure"
    if course.get("cloud_refused"):
        said += ", which was not sure; the foundation model could not be had"
    if {"drafted", "accepted", "checks"} <= course.keys():
        said += f", {course['accepted']} of {course['drafted']} drafted tokens taken in {course['checks']} calls"
    return said

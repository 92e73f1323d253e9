"""python -m pipelines.explore [RUN]: a page in the browser to sample and inspect trained runs."""

import errno
import os
import socket
from dataclasses import dataclass
from typing import Annotated

import tyro

from pipelines.command_line import read_arguments
from pipelines.console import UserError, run_command, say
from pipelines.runs.names import Device


@dataclass(frozen=True)
class Arguments:
    """Sample and inspect trained runs in the browser."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[RUN]")]] = "mnist5k"
    """the run that is shown first: a name under checkpoints/, a trained model, a path, or hub:owner/name"""
    port: int = 7860
    """port of the page"""
    host: str = "127.0.0.1"
    """address to serve the page on: 127.0.0.1 for this machine only, 0.0.0.0 for every machine that can reach it"""
    device: Device = "auto"


def main(arguments: list[str] | None = None) -> None:
    asked = read_arguments(Arguments, "explore", arguments)
    check_port(asked.host, asked.port)
    serve(asked)


def check_port(host: str, port: int) -> None:
    """Raises UserError where nothing can be served there."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port is a number from 1 to 65535, not {port}")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: name another, such as --port {port + 1}") from error
        why = str(error.strerror).partition(" (")[0]  # what Python adds names the address once more
        raise UserError(f"nothing can be served at {host}, port {port}: {why}. Name another --host or --port.") from error


def serve(asked: Arguments) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        from pipelines.explorer.page import Page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the explorer needs gradio: pip install -e '.[explore]'") from error
    page = Page(asked.run, asked.device)
    page.views(asked.run)  # what is wrong with it is said here
    say(f"open http://{asked.host}:{asked.port} in a browser; Ctrl-C ends it")
    page.serve(asked.host, asked.port)


if __name__ == "__main__":
    run_command(main)

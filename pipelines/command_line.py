"""The arguments of the commands, read by tyro: options come from a dataclass, their help from the docstrings of its fields."""

from collections.abc import Callable
from typing import Any, TypeVar

import docstring_parser
import tyro

from pipelines.console import first_process

Asked = TypeVar("Asked")


def read_arguments(kind: Callable[..., Asked], command: str, arguments: list[str] | None = None, **settings: Any) -> Asked:
    """What was asked for, of this dataclass. Exits with a message where the arguments do not fit, and after --help.

    command: as it stands after `python -m pipelines.`. arguments: those of the process when None. settings: of tyro.cli.
    """
    program = f"python -m pipelines.{command}"
    return tyro.cli(kind, prog=program, args=arguments, console_outputs=first_process(), **settings)


def in_one_line(parse_docstrings: Callable[..., Any]) -> Callable[..., Any]:
    """docstring_parser.parse_from_object, with every description in one line: tyro 1.0 prints the line breaks of the source."""

    def joined(described: Any) -> Any:
        found = parse_docstrings(described)
        for field in found.params:
            field.description = " ".join(field.description.split()) if field.description else None
        return found

    return joined


docstring_parser.parse_from_object = in_one_line(docstring_parser.parse_from_object)

"""Computes the records of one notebook without the notebook, with the same parameters.

They go to runs/, where the notebook finds and shows them. Their names are printed, one a line.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

import click

from companion import files
from companion.items import ITEMS, WAYS, checked, compute
from companion.parameters import defaults, explained, read
from companion.settings import NOTEBOOKS, ParameterError


class Items(click.Group):
    """The items as commands, made when they are asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return ITEMS

    def get_command(self, context: click.Context, name: str) -> click.Command:
        if name not in ITEMS:
            checked(name, {})  # says what is wrong
        notebook = json.loads((files.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
        title = "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        text = f"{title}. {WAYS[NOTEBOOKS[name]][0]}"
        return Item(name, help=text, short_help=text, params=[PARAMETER, CHECK])


class Item(click.Command):
    """The command of an item: its help lists the parameters, and it prints the names of the records."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        values = defaults(str(self.name))
        with formatter.section("Parameters, with their defaults"):
            formatter.write_dl([(f"{k} {values[k]}", means) for k, means in explained(str(self.name)).items()])

    def invoke(self, context: click.Context) -> None:
        item, given = str(self.name), {name: read(text) for name, text in context.params["parameter"]}
        each = checked(item, given)
        from companion import processes
        from companion.machine import check_device
        from companion.networks import check_name
        from companion.records import record_name
        from wdat_core import WdatError

        try:
            if context.params["check"]:
                for one in each:
                    check_name(str(one.network), one.dataset, one.norm)
                    check_device(one.device)
                return
            with contextlib.redirect_stdout(sys.stderr), processes.joined():  # what is printed on the way is no name
                records = compute(item, each)
                first = processes.is_first()
        except WdatError as error:
            raise ParameterError(str(error)) from error
        if first:
            click.echo("\n".join(record_name(record) for record in records))


PARAMETER = click.Option(
    ["-p", "--parameter"], nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter; may be given many times."
)
CHECK = click.Option(
    ["--check"], is_flag=True, help="Check the parameters, the network and the device by name; compute nothing."
)


def main(arguments: Sequence[str]) -> None:
    """Run a command line; what the user can put right ends in one line on stderr."""
    items = Items(help=__doc__, options_metavar="", subcommand_metavar="ITEM [-p NAME VALUE]...")
    try:
        items.main([*arguments] or ["--help"], prog_name="python -m companion", standalone_mode=False)
    except (ParameterError, click.ClickException, click.Abort) as error:
        stopped = str(error) or "interrupted: run it again to go on"  # Abort, of Ctrl-C, has no words
        said = error.format_message() if isinstance(error, click.ClickException) else stopped
        click.echo(f"companion: {' '.join(said.split())}", err=True)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main(sys.argv[1:])

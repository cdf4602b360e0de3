"""The command line: `phi3-embed COMMAND`, or `python -m phi3_tools COMMAND`."""

import importlib
import sys

import typer

app = typer.Typer(name="phi3-embed", no_args_is_help=True, add_completion=False, help=__doc__)
COMMANDS = {
    "convert": "phi3_tools.checkpoint.command",
    "finetune": "phi3_tools.finetune.command",
    "compare": "phi3_tools.compare.command",
    "search": "phi3_tools.search",
    "embed": "phi3_tools.embed",
    "serve": "phi3_tools.serve",
    "export": "phi3_tools.export",
    "evaluate": "phi3_tools.evaluate",
    "demo": "phi3_tools.demo",
}


def _add(name, module):
    @app.command(
        name,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context):
        sys.argv = [name, *context.args]
        importlib.import_module(module).main()


for _name, _module in COMMANDS.items():
    _add(_name, _module)


def main():
    app()

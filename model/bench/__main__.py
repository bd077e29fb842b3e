"""The command line of the benchmarks: one module a subcommand."""

import argparse
import logging
import sys
from collections.abc import Sequence

from model.bench import engine, peers, prefix, roofline, steps
from model.bench.gpu import command as gpu
from model.errors import AttendantError

COMMANDS = {"engine": engine, "steps": steps, "prefix": prefix, "roofline": roofline, "peers": peers, "gpu": gpu}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark. argv: without the program's name; default: the process's own."""
    parser = argparse.ArgumentParser(prog="attendant bench", description="Measure the engine and what surrounds it.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        about = module.__doc__ or ""
        command = commands.add_parser(
            name,
            help=about.partition("\n")[0],
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # the engine says which kernels it has chosen
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except AttendantError as error:
        sys.exit(f"attendant bench: {error}")

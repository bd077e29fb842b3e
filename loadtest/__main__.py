"""`attendant-load`: one run, the search for a capacity, or the comparison of two runs.

    attendant-load run --host http://127.0.0.1:8000 --arrivals poisson:rate=5 -t 60s --report runs/a.json
    attendant-load capacity --host http://127.0.0.1:8000 --slo ttft_p99=300ms --workload chat
    attendant-load compare runs/a.json runs/b.json

Options of a run are Locust's and those of `loadtest/locustfile.py`; a search passes on all that are not its own.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from loadtest.capacity import CapacityError, Prober, locust_command, search, write
from loadtest.compare import CompareError, compare, differences, read
from loadtest.slo import seconds

FAILED, INVALID = 1, 2  # exit codes, as those of a run


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["run"]:
        command = locust_command(*arguments[1:])
        os.execv(command[0], command)
    parser = ArgumentParser("attendant-load", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("run", help="one run, by Locust", add_help=False)
    finder = commands.add_parser("capacity", help="the highest rate that keeps the objectives")
    finder.add_argument("--out", type=Path, default=Path("runs/capacity"), help="folder (default: runs/capacity)")
    finder.add_argument("--start", type=float, default=4.0, help="requests/s to begin with (default: 4)")
    finder.add_argument("--window", type=seconds, default="20s", help="measured for each probe at least (default: 20s)")
    finder.add_argument("--warmup", type=seconds, default="5s", help="before each window (default: 5s)")
    finder.add_argument("--tolerance", type=float, default=0.1, help="of the rate, as a share (default: 0.1)")
    comparer = commands.add_parser("compare", help="two runs, with confidence intervals")
    comparer.add_argument("a", type=Path)
    comparer.add_argument("b", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "capacity":
        return _capacity(options, rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    return _compare(options.a, options.b)


def _capacity(options: Namespace, rest: list[str]) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    prober = Prober(rest, options.out, window=options.window, warmup=options.warmup)
    try:
        capacity, points = search(prober, start=options.start, tolerance=options.tolerance)
    except CapacityError as error:
        print(f"attendant-load: {error}", file=sys.stderr)
        return INVALID
    write(capacity, points, options.out)
    print(f"\ncapacity: {capacity:.3g} requests/s, sustained twice; {options.out / 'capacity.html'} has the curve")
    beyond = min((point for point in points if not point.sustained), key=lambda point: point.rate)
    print(f"at {beyond.rate:.3g} requests/s: {'; '.join(beyond.why)}")
    return 0 if capacity else FAILED


def _compare(first: Path, second: Path) -> int:
    try:
        a, b = read(first), read(second)
    except CompareError as error:
        print(f"attendant-load: {error}", file=sys.stderr)
        return INVALID
    for difference in differences(a, b):
        print(f"not the same in both: {difference}")
    print(f"{'':<12}{'a':>12}{'b':>12}{'change':>10}{'95 % interval':>22}")
    changes = compare(a, b)
    for each in changes:
        scale, digits = (1.0, 1) if each.more_is_better else (1e3, 2)
        interval = f"{each.low:+.1%} to {each.high:+.1%}"
        print(
            f"{each.name:<12}{scale * each.a:>12.{digits}f}{scale * each.b:>12.{digits}f}{each.change:>+10.1%}"
            f"{interval:>22}  {each.verdict}"
        )
    print("latencies in milliseconds, from the intended send")
    invalid = [run.name for run in (a, b) if run.verdict != "VALID"]
    if invalid or not changes:
        print(f"INVALID: {', '.join(invalid) or 'too few requests to compare anything'}")
        return INVALID
    return FAILED if any(each.verdict == "worse" for each in changes) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Put the wire contract to a running server, row by row, and say where it differs.

It must not know how the server works: only routes of the contract are used, and no package but requests.
"""

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its neighbours are found from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.wire import guidance, http, native, openai, refusals, sagemaker
from scripts.wire.suite import WEIR, Check, Target, Verdict, checks_of, verdicts

DESCRIPTION = """\
Each check is one row of the contract: a route, a status, a header, the order of keys, a message. A row is either
TGI's letter, which a real TGI passes too, or a deviation that Weir makes on purpose; --tgi leaves those out. Limits are
read from /info, and a row that says nothing about this server or this model is skipped with its reason.

pass   the server does what the row says
FAIL   it does something else: the difference follows
skip   the row does not apply: the reason follows

The checks are sent one after the other, generate some hundreds of tokens and change nothing. Exit code: 0 if nothing
failed, 1 if something did, 2 if there is no server.
"""
EPILOG = """\
examples:
  python scripts/conformance.py --url http://127.0.0.1:8080
  python scripts/conformance.py --url http://127.0.0.1:8080 --only 'native.*' --only '*tool*'
  python scripts/conformance.py --url http://tgi:80 --tgi
  python scripts/conformance.py --url https://host --api-key "$KEY" --json | tail -1
"""
MODULES = (http, native, refusals, openai, guidance, sagemaker)
BAR = 30


def all_checks() -> list[Check]:
    """Every row, in the contract's order."""
    return checks_of(MODULES)


def chosen(checks: Iterable[Check], patterns: Sequence[str]) -> list[Check]:
    """The checks whose name or section matches a pattern; all of them without one."""
    return [
        check
        for check in checks
        if not patterns or any(_matches(check.name, glob) or _matches(check.row, glob) for glob in patterns)
    ]


def _matches(text: str, glob: str) -> bool:
    return glob in text or fnmatch.fnmatchcase(text, glob)


def record(url: str, found: Sequence[Verdict], seconds: float) -> dict[str, Any]:
    """The outcome for a program."""
    counts = {outcome: sum(one.outcome == outcome for one in found) for outcome in ("pass", "FAIL", "skip")}
    return {
        "url": url,
        "passed": counts["pass"],
        "failed": counts["FAIL"],
        "skipped": counts["skip"],
        "seconds": round(seconds, 1),
        "failures": {one.check.name: one.reason for one in found if one.outcome == "FAIL"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; the exit code."""
    options = _parser().parse_args(arguments)
    checks = chosen(all_checks(), options.only)
    if not checks:
        print(f"No check matches {', '.join(options.only)}; --list shows them all.", file=sys.stderr)
        return 2
    if options.list:
        for check in checks:
            print(f"{check.row:8} {check.holds:4} {check.name}")
        return 0
    if options.url is None:
        print("Say which server to ask: --url http://127.0.0.1:8080", file=sys.stderr)
        return 2
    url = options.url if "://" in options.url else f"http://{options.url}"
    target = Target(url, options.api_key)
    if trouble := _unreachable(target):
        print(trouble, file=sys.stderr)
        return 2
    begun = time.monotonic()
    found: list[Verdict] = []
    for verdict in verdicts(target, checks, tgi=options.tgi):
        found.append(verdict)
        _progress(len(found), len(checks))
        if not options.json and (verdict.outcome != "pass" or options.verbose):
            _show(verdict)
    outcome = record(url, found, time.monotonic() - begun)
    if not options.json:
        _summary(found)
    print(json.dumps(outcome, ensure_ascii=False))
    return 1 if outcome["failed"] else 0


def _unreachable(target: Target) -> str | None:
    """Why the server cannot be asked, and what to do."""
    try:
        answer = target.get("/health", timeout=10)
    except OSError as error:
        return f"No server answers at {target.url}: {error}"
    if answer.status_code != 200:
        return f"The server at {target.url} is not ready: /health says {answer.status_code}."
    if target.get("/info").status_code == 401:
        return f"The server at {target.url} asks for its key: give it with --api-key."
    return None


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        full = done * BAR // total
        end = "\n" if done == total else ""
        print(f"\r[{'#' * full}{'.' * (BAR - full)}] {done}/{total}", end=end, file=sys.stderr, flush=True)


def _show(verdict: Verdict) -> None:
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(clear, end="", file=sys.stderr, flush=True)
    whose = "Weir's own" if verdict.check.holds == WEIR else "TGI's"
    print(f"{verdict.outcome:5} {verdict.check.name}  ({whose}, section {verdict.check.row})")
    if verdict.reason:
        print(f"      {verdict.reason}")


def _summary(found: Sequence[Verdict]) -> None:
    print(f"\n{'part':10} {'pass':>5} {'FAIL':>5} {'skip':>5}")
    for module in MODULES:
        part = module.__name__.rpartition(".")[2]
        own = [one.outcome for one in found if one.check.name.startswith(f"{part}.")]
        print(f"{part:10} {own.count('pass'):5} {own.count('FAIL'):5} {own.count('skip'):5}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "conformance", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="the server, such as http://127.0.0.1:8080")
    parser.add_argument("--api-key", help="sent as a bearer token; rows about the key are skipped without it")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="names or sections; repeatable")
    parser.add_argument("--tgi", action="store_true", help="the server is a TGI: leave Weir's own deviations out")
    parser.add_argument("--list", action="store_true", help="list the rows and ask nobody")
    parser.add_argument("--verbose", action="store_true", help="show the rows that passed, too")
    parser.add_argument("--json", action="store_true", help="nothing but the last line")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`kprobe doctor`: what this kernel and machine can record, which causes that leaves out, and what to do about it.

Nothing is guessed from version numbers: the probe's programs are compiled, loaded and attached for a moment, as they
would be for a recording, and taken away again.

Exit status: 0 everything can be recorded, 3 something is missing and the table says what it costs, 1 nothing can be recorded.
"""

import sys
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  sudo kprobe doctor               the table
  sudo kprobe doctor --json        the same for a program: {"schema": "kprobe.doctor/1", "checks": [...], "families": {...}}
"""


@app.command(epilog=_EPILOG)
def doctor(json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """What this kernel can record: every event family, the causes that become unavailable without it, the remedy."""
    import orjson

    report = examine()
    if json:
        sys.stdout.buffer.write(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        _print(report)
    raise typer.Exit(1 if report["families"] is None else 3 if report["missing"] else 0)


def examine() -> dict[str, Any]:
    """The whole report; `families` is None where nothing can be recorded."""
    from events.errors import KprobeError
    from events.settings import ProbeSettings
    from probe.requirements import requirements
    from probe.source import KernelSource

    checks = [r.to_json() for r in requirements()]
    report: dict[str, Any] = {"schema": "kprobe.doctor/1", "checks": checks, "families": None, "missing": {}}
    report |= {"kernel": None, "unavailable_causes": ["every cause"], "error": None}
    failed = [c for c in checks if c["needed"] and not c["ok"]]
    if failed:
        report["error"] = f"{failed[0]['name']}: {failed[0]['found']}; {failed[0]['remedy']}"
        return report
    source = KernelSource(ProbeSettings(ring_bytes_per_cpu=4096), [])
    try:
        source.open()
        session = source.session()
    except KprobeError as error:
        return report | {"error": str(error)}
    finally:
        source.close()
    found = session["capabilities"]
    return report | {
        "kernel": session["kernel"]["release"],
        "families": session["families"],
        "missing": found["missing"],
        "unavailable_causes": found["unavailable_causes"],
    }


def _print(report: dict[str, Any]) -> None:
    from cli.render import aligned

    checks = [["", "needs", "found"], *([_mark(c["ok"], c["needed"]), c["name"], c["found"]] for c in report["checks"])]
    print("\n".join(aligned(checks)))
    for check in report["checks"]:
        if not check["ok"]:
            print(f"  {check['name']}: {check['remedy']}")
    if report["families"] is None:
        print(f"\nnothing can be recorded: {report['error']}", file=sys.stderr)
        return
    print(f"\nkernel {report['kernel']}")
    print("\n".join(aligned([["", "family", "events", "not here", "for"], *map(_line, report["families"].items())])))
    for name, gap in report["missing"].items():
        print(f"\nmissing {name} ({gap['purpose']}): without it no {', '.join(gap['causes']) or 'detail'}")
        print(f"  remedy: {gap['remedy']}")
    print(f"\ncauses that cannot be named here: {', '.join(report['unavailable_causes']) or 'none'}")


def _mark(ok: bool, needed: bool) -> str:
    return "ok" if ok else "NO" if needed else "-"


def _line(item: tuple[str, dict[str, Any]]) -> list[str]:
    from probe.capabilities import FAMILIES

    name, state = item
    total = len(state["present"]) + len(state["missing"])
    absent, more = ", ".join(state["missing"][:2]), len(state["missing"]) - 2
    absent += f" and {more} more" if more > 0 else ""
    return [_mark(state["attached"], True), name, f"{len(state['present'])}/{total}", absent or "-", FAMILIES[name].purpose]

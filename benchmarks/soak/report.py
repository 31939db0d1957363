"""The report of a soak: the tables, the last line, and whether it passed."""

from benchmarks.report import print_result, print_table
from benchmarks.soak.samples import FLAT_MIB, JUDGED_SECONDS, SERIES, Sample, line_of
from benchmarks.soak.scenario import Findings

# Must be the same after the load as before it.
MUST_COME_BACK = ("open_files", "tasks", "leases", "processes")


def report(findings: Findings) -> bool:
    """Print everything. Returns whether the soak passed."""
    if findings.before is None or findings.after is None or not findings.samples:
        raise RuntimeError("the soak was too short: there is no sample")
    _print_outcomes(findings)
    _print_series(findings, findings.before, findings.after)
    complaints = _complaints(findings, findings.before, findings.after)
    for complaint in complaints:
        print(f"FAILED: {complaint}")
    print_result("soak", {}, _figures(findings, findings.before, findings.after))
    return not complaints


def _print_outcomes(findings: Findings) -> None:
    ledger = findings.ledger
    rows = [["right, word by word", model, str(count)] for model, count in sorted(ledger.ok_by_model.items())]
    rows += [[f"client left {when}", "", str(count)] for when, count in sorted(ledger.left.items())]
    rows += [
        [f"{code}: {why}", model, str(count)]
        for (model, code, why), count in sorted(ledger.explained.items())
    ]
    rows += [["UNEXPLAINED", "", str(ledger.unexplained)]]
    rows += [[f"done: {deed.value}", "", str(count)] for deed, count in ledger.timeline.counts.items()]
    rows += [
        [f"slowest {path}", "", f"{seconds * 1000:.0f} ms"]
        for path, seconds in sorted(findings.watch.slowest.items())
    ]
    print_table(["outcome", "model", "count"], rows)
    print()


def _print_series(findings: Findings, before: Sample, after: Sample) -> None:
    rows = []
    for series in SERIES:
        line = line_of(findings.samples, series)
        values = (getattr(before, series), line.first, line.last, line.slope_per_hour, getattr(after, series))
        rows.append([series, *(f"{value:.1f}" for value in values)])
    print_table(
        ["in the lulls", "before the load", "after warm-up", "end", "slope per hour", "settled"], rows
    )
    line = line_of(findings.samples, "resident_mib")
    print(
        f"memory: the line after the warm-up rises by {line.rise:+.2f} MiB, "
        f"{line.rise * (1 << 20) / max(1, findings.ledger.requests):+.0f} bytes a request; "
        f"less than {FLAT_MIB:g} MiB counts as flat, judged in soaks of at least {JUDGED_SECONDS:g} s\n"
    )


def _complaints(findings: Findings, before: Sample, after: Sample) -> list[str]:
    complaints = []
    if findings.ledger.unexplained:
        complaints.append(f"{findings.ledger.unexplained} errors are unexplained")
    for series in MUST_COME_BACK:
        was, remains = getattr(before, series), getattr(after, series)
        if was != remains:
            complaints.append(f"{series}: {was} before the load, {remains} after it")
    rise = line_of(findings.samples, "resident_mib").rise
    if findings.seconds >= JUDGED_SECONDS and rise >= FLAT_MIB:
        complaints.append("memory is not flat")
    if findings.exit_code != 0:
        complaints.append(f"the service ended with exit code {findings.exit_code} after SIGTERM")
    if findings.processes_left:
        complaints.append(f"{findings.processes_left} processes outlived the service")
    return complaints


def _figures(findings: Findings, before: Sample, after: Sample) -> dict[str, float | None]:
    ledger, counters = findings.ledger, findings.counters
    memory = line_of(findings.samples, "resident_mib")
    return {
        "duration_s": round(findings.seconds),
        "requests": ledger.requests,
        "ok": ledger.ok,
        "left_by_clients": ledger.left.total(),
        "explained_errors": ledger.explained.total(),
        "unexplained_errors": ledger.unexplained,
        "scrapes": findings.watch.scrapes,
        "loads": counters["loads_ok"],
        "failed_loads": counters["loads_failed"],
        "evictions": counters["evictions"],
        "deaths": counters["engine_deaths"],
        "rss_growth_mib": round(memory.rise, 2),
        "rss_growth_mib_per_hour": round(memory.slope_per_hour, 1),
        "fds_left": after.open_files - before.open_files,
        "tasks_left": after.tasks - before.tasks,
        "threads_left": after.threads - before.threads,
        "leases_left": after.leases - before.leases,
        "processes_left": findings.processes_left + after.processes - before.processes,
        "exit_code": findings.exit_code,
    }

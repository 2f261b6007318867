"""The report of first.py: a line of JSON per result, flushed as it comes, and beside it the times as a report of
`gnaforge bench`, which ``gnaforge bench --from`` reads."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

Json = dict[str, Any]
KINDS = {"gnaforge": "of gnaforge", "cudnn dense": "of cuDNN", "flash dense": "of flash"}
"""Contenders, for people."""


class Report:
    """Writes results.

    Args:
        folder: where; it is made.
        schema: of the bench report.
        kernels: keys of all kernels.

    Attributes:
        path: the file of lines.
        machine: facts of the GPU and torch.
        failures: results that say that something is wrong.

    Raises:
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, schema: int, kernels: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.timezone.utc)
        self._stem = folder / f"first-{now:%Y-%m-%d-%H%M%S}"
        self.path, self.log = self.file("jsonl"), self.file("log")
        self._lines = self.path.open("w")
        self._start = time.monotonic()
        self._section, self._began = "", 0.0
        self.machine: Json = {}
        self.failures = 0
        self._rows: dict[tuple[str, str], Json] = {}
        date = now.isoformat(timespec="seconds")
        self._bench: Json = {"schema": schema, "date": date, "machine": self.machine, "kernels": kernels}
        self._bench |= {"problems": [], "complete": False}

    def file(self, suffix: str) -> Path:
        """The name of a file of this report."""
        return self._stem.with_name(f"{self._stem.name}.{suffix}")

    def _write(self, kind: str, **fields: Any) -> None:
        where = {"section": self._section} if self._section else {}
        line = {"at": round(time.monotonic() - self._start, 2), **where, "kind": kind, **fields}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def facts(self, found: Json) -> None:
        """Facts of this machine and run."""
        kept = {name: value for name, value in found.items() if name != "took"}
        self.machine |= {name: value for name, value in kept.items() if isinstance(value, str | int | float)}
        self._write("facts", **found)
        if self._section:
            kept.pop("carried", None)
            print(f"  {json.dumps(kept)}", flush=True)

    def begin(self, section: str) -> None:
        """A section begins."""
        self._section, self._began = section, time.monotonic()
        print(f"{section}:", flush=True)

    def end(self, status: str) -> None:
        """A section ended."""
        seconds = round(time.monotonic() - self._began, 1)
        self._write("end", status=status, seconds=seconds)
        print(f"  {status}, {seconds} s", flush=True)
        self._section = ""

    def fault(self, message: str) -> None:
        """A section broke off."""
        self.failures += 1
        self._write("fault", message=message)
        print(f"  FAILED {message}", flush=True)

    def result(self, job: Json, answer: Json, told: bool = True) -> None:
        """A check's result, also printed if it is ``told``."""
        self.failures += "failed" in answer
        self._write("result", job=job, **answer)
        if told:
            print(f"  {'FAILED ' if 'failed' in answer else ''}{json.dumps(job)}: {_told(answer)}", flush=True)

    def run(self, row: Json, run: Json, answer: Json) -> None:
        """A measurement, of a row of the plan."""
        self.failures += "failed" in answer
        said = {name: run[name] for name in ("contender", "kernel", "tiles", "flop") if name in run}
        asked = {"seconds_asked": run["seconds"]}
        bounds = {name: row[name] for name in ("label", "work_bound", "model_seconds")}
        self._write("run", **bounds, **said, **asked, **derived(run, answer, self._processors), **answer)
        self._keep(row, run, answer)
        print(f"  {tell_run(row, run, answer, self._processors)}", flush=True)

    def compare(self, rows: list[Json]) -> None:
        """Compares the times of rows, once they are there."""
        for row in rows:
            found = ratios(row, [other for other in rows if other["group"] == row["group"]], self._times)
            if found:
                self._write("ratios", label=row["label"], **found)
                told = (f"{value:.3g} {name}" for name, value in found.items())
                print(f"  {row['label']}: {', '.join(told)}", flush=True)

    @property
    def _processors(self) -> int:
        return int(self.machine.get("processors", 0))

    @property
    def _times(self) -> dict[str, dict[str, float]]:
        """Seconds by label and contender, of this section."""
        rows = {label: row["timings"] for (section, label), row in self._rows.items() if section == self._section}
        return {label: {one["contender"]: one["seconds"] for one in found} for label, found in rows.items()}

    def _keep(self, row: Json, run: Json, answer: Json) -> None:
        """In the bench report: of several runs of a contender the first, in a burst."""
        key = self._section, row["label"]
        if key not in self._rows:
            kept = ("problem", "kernel", "flop_bound", "work_bound")
            made = {name: row[name] for name in kept}
            self._rows[key] = {**made, "notes": {}, "timings": []}
            self._bench["problems"].append(self._rows[key])
        found, contender = self._rows[key], run["contender"]
        if "seconds" not in answer:
            found["notes"].setdefault(contender, _told(answer)[:300])
        elif contender not in [timing["contender"] for timing in found["timings"]]:
            timing = {"contender": contender, "seconds": answer["seconds"], "fastest": answer["seconds"]}
            rates = {"useful_gflops": run["flop"] / answer["seconds"] / 1e9, "rounds": 1, "difference": None}
            found["timings"].append({**timing, **rates})
        self.file("bench.json").write_text(json.dumps(self._bench, indent=1) + "\n")

    def complete(self) -> None:
        """All sections were tried."""
        self._bench["complete"] = True
        if self._rows:
            self.file("bench.json").write_text(json.dumps(self._bench, indent=1) + "\n")


def derived(run: Json, answer: Json, processors: int) -> Json:
    """Numbers that follow from a measurement: TFLOP/s; cycles that the processor with the most KV tiles has for each,
    and how much of them its tensor cores need."""
    if "seconds" not in answer:
        return {}
    found: Json = {"tflops": run["flop"] / answer["seconds"] / 1e12}
    if answer.get("cycles") and processors and "tiles" in run:
        found["cycles_per_q_tile"] = answer["cycles"] / -(-run["tiles"]["q"] // processors)
        cycles = found["cycles_per_tile"] = answer["cycles"] / tiles_of_busiest(run["tiles"], processors)
        found["tensor_share"] = run["tiles"]["tensor_cycles"] / cycles
    return found


def ratios(row: Json, group: list[Json], times: dict[str, dict[str, float]]) -> Json:
    """Speed of a row's kernel in times that of dense attention, by who computes that, beside what its tiles and the
    simulator's model allow; of dense attention: as the first row of its group."""
    ours = times.get(row["label"], {}).get("gnaforge")
    if ours is None:
        return {}
    if row["flop_bound"] == 1:
        first = times.get(group[0]["label"], {}).get("gnaforge")
        others = {name: time for name, time in times[row["label"]].items() if name != "gnaforge"}
        others |= {group[0]["label"]: first} if first and group[0] is not row and group[0]["flop_bound"] == 1 else {}
        return {f"times as fast as {name}": time / ours for name, time in others.items()}
    own = times[row["label"]].get("gnaforge dense")
    dense = {"its own dense run": own}
    for other in group:
        if other["flop_bound"] == 1:
            dense |= {f"dense {KINDS.get(n, n)}": time for n, time in times.get(other["label"], {}).items()}
    found: Json = {f"times as fast as {name}": time / ours for name, time in dense.items() if time}
    return {**found, "by its tiles": row["work_bound"], "by the model": row["model_speedup"]} if found else {}


def tiles_of_busiest(tiles: Json, processors: int) -> float:
    """KV tiles of the processor with the most Q tiles, if all Q tiles have as many."""
    return float(-(-tiles["q"] // processors) * tiles["kv"] / tiles["q"])


def tell_run(row: Json, run: Json, answer: Json, processors: int) -> str:
    """A measurement in a line."""
    name = f"{row['label']}: {run['contender']}"
    if "seconds" not in answer:
        return f"{'FAILED ' if 'failed' in answer else ''}{name}: {_told(answer)}"
    found = derived(run, answer, processors)
    parts = [f"{answer['seconds'] * 1e3:.4g} ms", f"{found['tflops']:.3g} TFLOP/s"]
    if answer.get("mhz"):
        parts.append(f"{answer['mhz']:.0f} MHz")
    if "cycles_per_tile" in found:
        needed = run["tiles"]["tensor_cycles"]
        each = run["tiles"]["kv"] / run["tiles"]["q"]
        parts.append(f"{found['cycles_per_q_tile']:.0f} cycles a Q tile with {each:.3g} KV tiles")
        parts.append(f"{found['cycles_per_tile']:.0f} cycles a KV tile that takes {needed:.0f} at best")
    if (answer.get("host_seconds") or 0) > 0.8 * answer["seconds"]:
        parts.append(f"of which the host takes {answer['host_seconds'] * 1e3:.2g} ms, so it says little of the GPU")
    if run["contender"] == "gnaforge":
        parts.append(f"model {row['model_seconds'] * 1e3:.4g} ms")
    if "share" in answer:
        parts.append(f"error {answer['share']:.0%} of its bound")
    wrong = f"FAILED {answer['message']}: " if "failed" in answer else ""
    return f"{wrong}{name}, {answer['launches']} launches: {', '.join(parts)}"


def _told(answer: Json) -> str:
    """The text of an answer without a time."""
    for name in ("message", "unavailable", "skipped"):
        if name in answer:
            return str(answer[name])
    return json.dumps({name: value for name, value in answer.items() if name != "text"})

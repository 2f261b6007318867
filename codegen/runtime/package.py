"""Makes a wheel's package: it brings its core and kernels into the process, and says what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import core, family, lookup
from .availability import why_not
from .config import OPS, KernelConfig
from .request import Request

CORE = "core.so"
LIBRARY = "kernels.so"
METADATA = "gnaforge.json"
_CHANGES = {
    "file": "Give its spec {entry}",
    "preset": "It is of a preset, which isn't yours to change: write that to a file with `gnaforge presets NAME`, give "
    "the file {entry}, name it in the preset's place",
    "key": "It is of one kernel's key: write a spec with that kernel and {entry}, name it in the key's place",
}
_AGAIN = {"wheel": "build the wheel", "export": "write the export"}


def reasons_against(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Why each kernel of a wheel with this metadata can't run on this machine, by key; an empty text if it can."""
    facts = {name: family.FamilyFacts.from_json(values) for name, values in metadata["families"].items()}
    reasons = {name: why_not(one, metadata["cuda_runtime"] or "") for name, one in facts.items()}
    return {row["key"]: reasons[row["family"]] for row in metadata["kernels"]}


class Package:
    """A wheel's package, installed in ``folder``. Its kernels are loaded when a call or a listing first needs them.

    It never builds a kernel: for a call that none fits it says how to build the wheel again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata: dict[str, Any] = {}
        core.set_core_files(lambda: [folder / CORE])
        core.add_own_library(folder / LIBRARY)
        lookup.set_package_remedy(self.remedy)
        family.set_provider(self._facts)

    def metadata(self) -> dict[str, Any]:
        """What is in the wheel: its kernels with their digests and sizes, compilers, licences. Do not change it."""
        if not self._metadata:
            self._metadata = json.loads((self._folder / METADATA).read_text())
        return self._metadata

    def libraries(self) -> list[str]:
        """Paths of the kernel libraries: what the entry point ``gnaforge.libraries`` is asked for."""
        return [str(self._folder / LIBRARY)]

    def status(self) -> dict[str, str]:
        """Why each of the wheel's kernels can't run on this machine, by key; an empty text if it can."""
        return reasons_against(self.metadata())

    def _facts(self, config: KernelConfig) -> family.FamilyFacts | None:
        found = self.metadata()
        names = [row["family"] for row in found["kernels"] if row["key"] == config.key]
        return family.FamilyFacts.from_json(found["families"][names[0]]) if names else None

    def report(self) -> str:
        """What the wheel holds and what of it runs here, as text."""
        import torch

        found = self.metadata()
        lines = [
            f"{found['name']} {found['version']}, built by gnaforge {found['gnaforge']}; torch {torch.__version__}"
        ]
        for key, reason in self.status().items():
            lines.append(f"  {key}: {'can not run here: ' + reason if reason else 'runs here'}")
        return "\n".join(lines)

    def remedy(self, request: Request) -> str:
        """How to get a kernel for the request: another wheel, with one more entry in its spec.

        Raises:
            ValueError: no kernel of the wheel's families can serve it; says what the caller has to change.
        """
        found = self.metadata()
        facts = map(family.FamilyFacts.from_json, found["families"].values())
        never = [one.why_never(request) for one in facts if one.device == request.device]
        if never and all(never) and not request.key:
            raise ValueError(never[0]) from None
        arch = "cpu" if request.device == "cpu" else "your GPU's"
        value = f", value_head_dim {request.value_head_dim}" if request.value_head_dim != request.head_dim else ""
        tiles = f", tiles {{q: {request.q_tile}, kv: {request.kv_tile}}}" if request.q_tile or request.kv_tile else ""
        direction = "" if request.op == OPS[0] else ", direction training"
        entry = (
            f"an entry with rank {request.rank}, head_dim {request.head_dim}{value}, dtype "
            f"{request.dtype}{tiles}{direction} and arch {arch}"
        )
        text = (
            f"{found['name']} {found['version']} holds the kernels that it was built with and compiles none. "
            f"{_CHANGES[found['source']].format(entry=entry)}, and {_AGAIN[found['kind']]} again: {found['rebuild']}"
        )
        reasons = sorted({reason for reason in self.status().values() if reason})
        return f"{text}\nKernels that can't run here: {'; '.join(reasons)}" if reasons else text

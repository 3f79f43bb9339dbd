"""Build a plan and measure it, each measurement in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.fitting.packed import pack_rounded
from moesaic.fitting.plans import MIXED, Candidate
from moesaic.serving.streamed.bits import Bits
from moesaic.serving.streamed.packing import pack
from moesaic.surgery.operate import operate
from moesaic.trace.calibration import Calibration

GROUP = 64
"""Weights of a row that share a scale."""


@dataclass(frozen=True)
class Trials:
    """Where plans are built, and on what they are measured."""

    model: Path
    work: Path
    calibrate: Callable[[Path], Calibration]
    """Of the model or of a plan's folder: what the user's text shows there."""
    test: Path
    """JSON lines of the text that plans are scored on; not calibrated on."""
    prompt: str
    new_tokens: int
    context: int | None
    threads: int | None
    seconds: float = 1800.0
    """For one measurement; a plan that takes longer is left out."""

    def folder(self, plan: Candidate) -> Path:
        """The checkpoint of a plan, built if it is not there. Raises BadInput for what cannot be built."""
        folder = self.model
        if plan.method:
            family, method = plan.method.split()
            folder = self.work / plan.label
            if not folder.is_dir():
                known = self.calibrate(self.model)
                operate(self.model, folder, family, method, plan.options, calibration=known, resume=_left(folder))
        if plan.bits < 16 or plan.resident < 1:
            packed = self.work / f"{plan.label}-{plan.bits:g}bit"
            if packed.is_dir():
                pass
            elif plan.bits in MIXED:
                self._mixed(folder, packed, plan.bits)
            else:
                pack(folder, packed, bits=None if plan.bits >= 16 else Bits(int(plan.bits)), resume=_left(packed))
            folder = packed
        return folder

    def _mixed(self, folder: Path, packed: Path, bits: float) -> None:
        """Errors are those of the weights, so that counts are all that has to be known: any model's fit in memory."""
        rounded = packed.with_name(packed.name + ".rounded")
        options = {"bits": bits, "error": "weights", "rounding": "nearest"}
        report = operate(folder, rounded, "quantize", "pmq", options, calibration=self.calibrate(folder), resume=_left(rounded))
        pack_rounded(rounded, packed, report.blocks, GROUP)

    def measure(self, plan: Candidate) -> dict[str, Any]:
        """A row: what the plan takes, how fast it speaks, what it costs in bits per byte. Raises BadInput with the reason."""
        folder = self.folder(plan)
        budget = [] if plan.resident >= 1 else ["--memory", str(int(plan.resident * plan.expert_bytes))]
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        run = self._say(
            ["run", str(folder), self.prompt, "--max-new-tokens", str(self.new_tokens), "--no-page", *budget, *threads], plan
        )
        context = [] if self.context is None else ["--context", str(self.context)]
        score = self._say(["eval", str(folder), "--data", str(self.test), *budget, *context, *threads], plan)
        return {
            "plan": plan.name, "method": plan.method, "scope": plan.scope, "keep": plan.keep, "bits": plan.bits,
            "resident": plan.resident, "memory_bytes": plan.memory_bytes,
            "peak_bytes": run.get("peak_bytes") or run.get("process_bytes"),
            "tokens_per_second": run["tokens_per_second"], "predicted_tokens_per_second": plan.predicted,
            "bits_per_byte": score["bits_per_byte"], "hit_rate": run.get("hit_rate"),
            "domains": {name: row["bits_per_byte"] for name, row in score["domains"].items()},
            "exact": plan.exact, "folder": str(folder), "command": f"moesaic run {{OUT}} {' '.join(budget)}".strip(),
        }  # fmt: skip

    def _say(self, arguments: list[str], plan: Candidate) -> dict[str, Any]:
        command = [sys.executable, "-m", "moesaic", *arguments, "--json"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=self.seconds, env=dict(os.environ)
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BadInput(f"{plan.name}: no answer in {self.seconds:,.0f} s") from error
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if line.strip()]
            raise BadInput(f"{plan.name}: {words[-1] if words else f'exit code {done.returncode}'}")
        return json.loads(done.stdout)


def tried(
    trials: Trials, plans: list[Candidate], say: Callable[[str, int, int], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of all plans that could be built and run, and a note for each that could not."""
    rows, notes = [], []
    for number, plan in enumerate(plans):
        say(plan.name, number, len(plans))
        try:
            rows.append(trials.measure(plan))
        except MoesaicError as error:
            notes.append(f"{plan.name}: {error}")
    return rows, notes


def _left(folder: Path) -> bool:
    return folder.with_name(folder.name + ".partial").is_dir()

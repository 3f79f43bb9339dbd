"""EfficientLLM's six efficiency metrics, for any run that says when an iteration begins and what it made.

Card serving-and-scale.md, "EfficientLLM: six efficiency metrics" (arXiv 2505.13840), over a measured run [0, T]:

    AMU  mean used memory, bytes, for each tier apart       AL   mean latency of an iteration, s: computing + waiting
    PCU  mean utilisation of the processor (see below)      TT, ST, IT  tokens or samples / parameters / s; tokens / s
    AEC  mean power, watts; energy = AEC x T                MCR  size ratio x performance ratio of a compressed model

PCU is a time mean despite its name ("peak"). Two are given: the share of all cores' time that this process computed, and
achieved FLOP/s (2 x active parameters x tokens) over the peak that was measured on this machine and is passed in.
Means are by the left rule: a sample holds until the next one. So a signal that is constant between samples gives the same
mean however often it is sampled, and a constant one gives exactly itself. Energy comes from counters, whose difference is
exact however rarely they are read. Whoever measures runs the warm-up before it begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesaic.core.errors import BadInput, NotMoE
from moesaic.evaluation.probes import Gauge, cores, energy_gauges, memory_gauges


def left_mean(times: Sequence[float], values: Sequence[float], end: float) -> float:
    """The mean over [times[0], end] of a signal that keeps each value until the next time."""
    time_N, value_N = np.asarray(times, np.float64), np.asarray(values, np.float64)
    if not len(time_N) or len(time_N) != len(value_N) or (np.diff(time_N) < 0).any() or end < time_N[-1]:
        raise BadInput(f"a signal of {len(time_N)} times and {len(value_N)} values until {end}: times must rise up to the end")
    if end == time_N[0]:
        return float(value_N[-1])
    weight_N = np.diff(np.append(time_N, end))
    return float(value_N[0] + (weight_N * (value_N - value_N[0])).sum() / weight_N.sum())  # a constant stays that number


def compression_rate(size: float, size_compressed: float, performance: float, performance_compressed: float) -> float:
    """MCR. Performance is larger for better models: an accuracy, or 1 / bits per byte. Raises BadInput below or at 0."""
    values = (size, size_compressed, performance, performance_compressed)
    if not all(value > 0 and np.isfinite(value) for value in values):
        raise BadInput(f"a compression rate of sizes and performances {values}: each must be above 0")
    return (size / size_compressed) * (performance_compressed / performance)


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model, and those that one token touches: all but the experts that its routers do not choose."""

    total: int
    active: int

    @staticmethod
    def of(model: Any) -> Parameters:
        """Of a model before its experts are quantised; experts on disk count. A dense model is all active."""
        from moesaic.view.block import View

        total = sum(p.numel() for p in model.parameters())
        try:
            blocks = View(model)
        except NotMoE:
            return Parameters(total, total)
        idle = 0
        for block in blocks:
            experts = sum(p.numel() for p in block.experts.parameters())
            idle += experts * (block.num_experts - block.top_k) // block.num_experts
        return Parameters(total, total - idle)


def held_bytes(model: Any) -> int:
    """Bytes of the weights that a model has in memory, shared ones once; experts in few bits count as they lie."""
    from moesaic.view.implementation import STREAMED
    from moesaic.view.quantize import Computed

    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    stand_ins = (getattr(module, STREAMED, None) for module in model.modules())
    in_few_bits = sum(found.bank.nbytes for found in stand_ins if isinstance(found, Computed))
    return sum(t.nbytes for t in tensors if not t.is_meta) + in_few_bits


@dataclass
class Iteration:
    """One request or step. `seconds` in all, of them `waiting` for bytes of other tiers or devices; counts of what it made:
    tokens read (a prompt's), generated, trained on, and samples trained on."""

    seconds: float = 0.0
    waiting: float = 0.0
    read: int = 0
    generated: int = 0
    trained: int = 0
    samples: int = 0


class Meter:
    """Samples gauges in a thread of its own while it is open; `iteration` times what is to be counted.

    Args:
        memory, energy: gauges; default: all that this machine has.
        interval: seconds between samples. Phases shorter than that are seen by chance, in memory, and not lost, in energy.
    """

    def __init__(
        self, memory: Sequence[Gauge] | None = None, energy: Sequence[Gauge] | None = None, interval: float = 0.05
    ) -> None:
        if not interval > 0:
            raise BadInput(f"a sampling interval of {interval} seconds: give more than 0")
        self.memory = list(memory_gauges() if memory is None else memory)
        self.energy = list(energy_gauges() if energy is None else energy)
        self.interval = interval
        self.iterations: list[Iteration] = []
        self.seconds = self.cpu_seconds = 0.0
        self.times: list[float] = []
        self.values: dict[str, list[float]] = {gauge.name: [] for gauge in self.memory if gauge.read}
        self.joules: dict[str, float] = {}
        self._stop = threading.Event()
        self._failed: Exception | None = None

    def __enter__(self) -> Meter:
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._first = self._counters()
        self._sample()
        self._thread = threading.Thread(target=self._run, name="moesaic-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds, self.cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu
        if kind is None and self._failed is not None:
            raise self._failed
        self.joules = {name: value - self._first[name] for name, value in self._counters().items()}

    @contextmanager
    def iteration(self) -> Iterator[Iteration]:
        """Time one request or step; fill in what it made. One that fails is not counted."""
        found = Iteration()
        before = time.perf_counter()
        yield found
        found.seconds = time.perf_counter() - before
        self.iterations.append(found)

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.interval):
                self._sample()
                self._counters()  # a counter that begins anew must be read before it has done so twice
        except Exception as error:
            self._failed = error

    def _sample(self) -> None:
        self.times.append(time.perf_counter() - self._began)
        for gauge in self.memory:
            if gauge.read:
                self.values[gauge.name].append(float(gauge.read()))

    def _counters(self) -> dict[str, float]:
        return {gauge.name: float(gauge.read()) for gauge in self.energy if gauge.read}


@dataclass
class Efficiency:
    """The metrics of a finished `Meter`. A value that was not measured is None, and `not_measured` says why.

    Args:
        parameters: total and active; None leaves out what divides by them.
        peak_flops: what this machine reaches at most, FLOP/s; None leaves out that PCU.
    """

    meter: Meter
    parameters: Parameters | None = None
    peak_flops: float | None = None
    not_measured: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.meter.iterations:
            raise BadInput("nothing was measured: the run had no iteration")
        for kind, gauges in (("memory", self.meter.memory), ("energy", self.meter.energy)):
            self.not_measured |= {f"{kind}: {g.name}": g.why_not or "no reading" for g in gauges if g.read is None}
        if not self.meter.joules:
            self.not_measured.setdefault("energy", "no counter could be read")

    @property
    def amu_bytes(self) -> dict[str, float]:
        """Mean bytes of each tier."""
        meter = self.meter
        return {name: left_mean(meter.times, values, meter.seconds) for name, values in meter.values.items()}

    @property
    def amu_share(self) -> dict[str, float]:
        """The same as shares of what the tier holds, where that is known."""
        held = self.amu_bytes
        return {g.name: held[g.name] / g.capacity for g in self.meter.memory if g.name in held and g.capacity}

    @property
    def pcu_time(self) -> float:
        """Share of all usable cores' time that this process computed."""
        return self.meter.cpu_seconds / (self.meter.seconds * cores())

    @property
    def pcu_flops(self) -> float | None:
        """Achieved over peak FLOP/s: 2 per active parameter and token read or generated, 6 per token trained on."""
        if self.parameters is None or not self.peak_flops:
            return None
        passes = sum(2 * (i.read + i.generated) + 6 * i.trained for i in self.meter.iterations)
        return passes * self.parameters.active / self.meter.seconds / self.peak_flops

    @property
    def latencies(self) -> np.ndarray:
        """Seconds of each iteration."""
        return np.array([i.seconds for i in self.meter.iterations])

    @property
    def al_seconds(self) -> float:
        return float(self.latencies.mean())

    def rate(self, what: str) -> float | None:
        """`generated`, `trained`, `samples` or `read` per second of iterations; None where there were none."""
        count = sum(getattr(i, what) for i in self.meter.iterations)
        return count / float(self.latencies.sum()) if count else None

    @property
    def energy_joules(self) -> float | None:
        """Of everything that was measured; None where nothing was."""
        return sum(self.meter.joules.values()) if self.meter.joules else None

    @property
    def aec_watts(self) -> float | None:
        energy = self.energy_joules
        return None if energy is None else energy / self.meter.seconds

    def row(self) -> dict[str, Any]:
        """As keys of a JSON object."""
        meter, p = self.meter, self.parameters
        generated = sum(i.generated for i in meter.iterations)
        found: dict[str, Any] = {
            "iterations": len(meter.iterations),
            "seconds": meter.seconds,
            "sampling_seconds": meter.interval,
            "amu_bytes": self.amu_bytes,
            "amu_share": self.amu_share,
            "peak_bytes": {name: max(values) for name, values in meter.values.items()},
            "pcu_time": self.pcu_time,
            "pcu_flops": self.pcu_flops,
            "peak_flops": self.peak_flops,
            "al_seconds": self.al_seconds,
            "al_waiting_seconds": sum(i.waiting for i in meter.iterations) / len(meter.iterations),
            "al_seconds_min_median_max": [float(np.quantile(self.latencies, q)) for q in (0, 0.5, 1)],
            "it_tokens_per_second": self.rate("generated"),
            "aec_watts": self.aec_watts,
            "energy_joules": self.energy_joules,
            "joules_by_source": meter.joules,
            "joules_per_token": self.energy_joules / generated if self.energy_joules is not None and generated else None,
            "parameters": None if p is None else p.total,
            "active_parameters": None if p is None else p.active,
            "not_measured": self.not_measured,
        }
        for key, what in (("tt_tokens_per_parameter_second", "trained"), ("st_samples_per_parameter_second", "samples")):
            rate = self.rate(what)
            if rate is not None and p is not None:
                found |= {key: rate / p.total, f"active_{key}": rate / p.active}
        return found


def measure_generation(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    meter: Meter,
    *,
    waited: Callable[[], float] = lambda: 0.0,
    warm_up: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Continue each prompt by exactly `new_tokens`, greedily, one request at a time: an iteration is a request.

    `waited`: seconds spent waiting so far, such as for experts from disk. The first `warm_up` prompts run once before
    measuring begins. Raises BadInput for a prompt without room.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for ids in prompts:
        if not len(ids) or (longest is not None and len(ids) + new_tokens > longest):
            raise BadInput(f"a prompt of {len(ids)} tokens and {new_tokens} new ones: this model takes 1 to {longest} in all")
    device = model.get_input_embeddings().weight.device

    def answer(ids: Sequence[int]) -> None:
        given = torch.tensor([list(ids)], device=device)
        with torch.inference_mode():
            model.generate(
                given, attention_mask=torch.ones_like(given), do_sample=False, temperature=None, top_k=None, top_p=None,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()

    for ids in prompts[:warm_up]:
        answer(ids)
    with meter:
        for done, ids in enumerate(prompts):
            before = waited()
            with meter.iteration() as found:
                answer(ids)
            found.read, found.generated, found.waiting = len(ids), new_tokens, waited() - before
            progress(done + 1)

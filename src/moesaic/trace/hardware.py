"""The time model: how long an expert takes on the device, on the host, and over the link between them.

    t_gpu(n, b) = latency + max(b / device bandwidth, n * 2 b / bytes per parameter / device FLOP/s)

for n tokens and an expert of b bytes; t_cpu is the same with the host's figures; t_move(b) = latency + b / link bandwidth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput


@dataclass(frozen=True)
class Hardware:
    """Speeds of one machine. "Device" computes what is cached, the "link" is what a miss crosses, the "host" may compute.

    A host of 0 FLOP/s means that misses can only be moved: so it is where experts stream from a disk.
    """

    name: str = "stated"
    link_bytes_per_second: float = 25e9
    link_latency_seconds: float = 10e-6
    device_bytes_per_second: float = 936e9
    device_flops: float = 71e12
    device_latency_seconds: float = 5e-6
    host_bytes_per_second: float = 0.0
    host_flops: float = 0.0
    host_latency_seconds: float = 0.0
    bytes_per_parameter: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            positive = field.name in ("link_bytes_per_second", "device_bytes_per_second", "device_flops", "bytes_per_parameter")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise BadInput(f"hardware {self.name}: {field.name} is {value}: give a number above 0")

    def t_move(self, size: float) -> float:
        """Seconds to bring `size` bytes over the link."""
        return self.link_latency_seconds + size / self.link_bytes_per_second

    def t_gpu(self, tokens: int, size: float) -> float:
        """Seconds for an expert of `size` bytes on the device."""
        flops = 2 * size / self.bytes_per_parameter * tokens
        return self.device_latency_seconds + max(size / self.device_bytes_per_second, flops / self.device_flops)

    def t_cpu(self, tokens: int, size: float) -> float:
        """Seconds on the host; infinite where there is none."""
        if not self.host_flops or not self.host_bytes_per_second:
            return math.inf
        flops = 2 * size / self.bytes_per_parameter * tokens
        return self.host_latency_seconds + max(size / self.host_bytes_per_second, flops / self.host_flops)

    def array(self, dense_bytes: float = 0.0) -> np.ndarray:
        """As compiled code reads it, with the bytes of everything but routed experts of one layer."""
        return np.array([getattr(self, f.name) for f in fields(self) if f.name != "name"] + [dense_bytes], np.float64)

    def with_(self, **changes: float | str | None) -> Hardware:
        """A copy with the given speeds; None keeps what was."""
        given: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        return replace(self, **given)

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of_profile(profile: dict[str, Any], name: str) -> Hardware:
        """From what `moesaic bench machine` measured. Without a GPU the device is the CPU and the link is its disk."""
        cuda = "gpu" in profile.get("machine", {})
        try:
            read, flops = float(profile["read_bytes_per_second"]), float(profile["bfloat16_flops"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{name}: no machine profile ({error}): make one with `moesaic bench machine`") from error
        link = profile.get("link_bytes_per_second") if cuda else profile.get("disk_bytes_per_second")
        made = Hardware(name, device_bytes_per_second=read, device_flops=max(flops, float(profile.get("float32_flops", 0))))
        if link is None:
            made = made.with_(name=f"{name} (its link was not measured: {made.link_bytes_per_second / 1e9:g} GB/s is stated)")
        made = made.with_(link_bytes_per_second=link)
        return made if cuda else made.with_(device_latency_seconds=1e-6, link_latency_seconds=1e-4)


LINK_BW, LINK_WAIT, DEVICE_BW, DEVICE_FLOPS, DEVICE_WAIT, HOST_BW, HOST_FLOPS, HOST_WAIT, WIDTH, DENSE = range(10)
"""Where `Hardware.array` puts each figure."""

KNOWN = {
    "pcie4": Hardware("pcie4", host_bytes_per_second=60e9, host_flops=1.5e12, host_latency_seconds=20e-6),
    "pcie3": Hardware(
        "pcie3", 12e9, device_bytes_per_second=484e9, device_flops=22e12, host_bytes_per_second=40e9, host_flops=8e11,
        host_latency_seconds=20e-6,
    ),
    "pcie5": Hardware(
        "pcie5", 50e9, device_bytes_per_second=3350e9, device_flops=800e12, host_bytes_per_second=250e9, host_flops=6e12,
        host_latency_seconds=20e-6,
    ),
    "nvme": Hardware(
        "nvme", 5e9, link_latency_seconds=1e-4, device_bytes_per_second=60e9, device_flops=1.5e12, device_latency_seconds=1e-6
    ),
}  # fmt: skip
"""Stated, not measured: a consumer GPU on PCIe 4 or 3, a server's on PCIe 5, and a desktop CPU that streams from an SSD."""

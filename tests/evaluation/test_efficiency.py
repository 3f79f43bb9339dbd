"""EfficientLLM's six metrics: card serving-and-scale.md, "EfficientLLM: six efficiency metrics"."""

from __future__ import annotations

import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.evaluation import efficiency as e
from moesaic.evaluation import probes
from moesaic.evaluation.probes import Gauge


@pytest.mark.parametrize("value", [0.1, 1 / 3, 17_179_869_183.7])
def test_a_constant_signal_gives_exactly_that_constant(value):
    times = np.cumsum(np.random.default_rng(0).uniform(0.001, 0.3, 57)).tolist()
    assert e.left_mean(times, [value] * 57, times[-1] + 0.07) == value


def test_the_mean_does_not_depend_on_the_sampling_rate():
    changes, levels, end = [0.0, 1.5, 2.0, 6.25], [4.0, 9.0, 1.0, 3.0], 8.0
    exact = sum(v * d for v, d in zip(levels, np.diff([*changes, end]), strict=True)) / end
    for step in (0.25, 0.125, 0.0625):
        times = np.arange(0, end, step)
        values = [levels[np.searchsorted(changes, t, side="right") - 1] for t in times]
        assert e.left_mean(times.tolist(), values, end) == pytest.approx(exact, rel=1e-12)
    odd = sorted({*changes, *np.random.default_rng(1).uniform(0, end, 40).tolist()})  # uneven, but every change is seen
    values = [levels[np.searchsorted(changes, t, side="right") - 1] for t in odd]
    assert e.left_mean(odd, values, end) == pytest.approx(exact, rel=1e-12)
    trapezoid = np.trapezoid([4.0, 9.0, 1.0, 3.0, 3.0], [*changes, end]) / end
    assert trapezoid != pytest.approx(exact, rel=0.01)  # the other rule would give another number


def test_a_sample_that_changes_late_counts_until_the_next_one():
    assert e.left_mean([0, 1, 3], [2, 8, 5], 4) == (2 * 1 + 8 * 2 + 5 * 1) / 4
    assert e.left_mean([5.0], [7.0], 5.0) == 7.0
    for times, end in (([0, 2, 1], 3), ([0, 1, 2], 1.5), ([], 1)):
        with pytest.raises(BadInput, match="times must rise"):
            e.left_mean(times, [1.0] * len(times), end)


def test_compression_rate():
    assert e.compression_rate(5e9, 5e9, 0.7, 0.7) == 1
    assert e.compression_rate(100, 25, 0.8, 0.6) == pytest.approx(3)
    with pytest.raises(BadInput, match="above 0"):
        e.compression_rate(1, 0, 1, 1)


def run(iterations, memory=(), energy=(), interval=0.005):
    """A meter that slept through `iterations`: (seconds, counts)."""
    meter = e.Meter(memory, energy, interval)
    with meter:
        for seconds, counts in iterations:
            with meter.iteration() as found:
                time.sleep(seconds)
                for name, count in counts.items():
                    setattr(found, name, count)
    return meter


def test_memory_is_sampled_while_it_runs():
    level = iter(range(10_000))
    meter = run([(0.1, {"generated": 1})], [Gauge("flat", lambda: 12.5, capacity=50), Gauge("up", lambda: next(level))])
    found = e.Efficiency(meter)
    assert found.amu_bytes["flat"] == 12.5
    assert found.amu_share == {"flat": 0.25}
    samples = len(meter.times)
    assert samples >= 5
    assert 0 < found.amu_bytes["up"] < samples


def test_a_gauge_that_fails_ends_the_run():
    def broken():
        broken.calls += 1
        if broken.calls > 1:
            raise OSError("gone")
        return 1.0

    broken.calls = 0
    with pytest.raises(OSError, match="gone"):
        run([(0.05, {})], [Gauge("broken", broken)])


def test_rates_and_latency():
    meter = run([(0.02, {"generated": 7}), (0.01, {"generated": 7}), (0.005, {"generated": 7})])
    found = e.Efficiency(meter)
    assert found.rate("generated") * found.al_seconds == pytest.approx(7)  # batch 1: IT x AL = tokens of a request
    assert found.rate("trained") is None
    row = found.row()
    assert row["al_seconds_min_median_max"][0] <= row["al_seconds_min_median_max"][1] <= row["al_seconds_min_median_max"][2]
    assert "tt_tokens_per_parameter_second" not in row


def test_training_rates_are_per_total_and_per_active_parameter():
    meter = run([(0.01, {"trained": 512, "samples": 4}), (0.02, {"trained": 256, "samples": 2})])
    found = e.Efficiency(meter, e.Parameters(total=1000, active=250), peak_flops=1e9)
    row, seconds = found.row(), float(found.latencies.sum())
    assert row["tt_tokens_per_parameter_second"] == pytest.approx(768 / 1000 / seconds)
    assert row["active_tt_tokens_per_parameter_second"] == pytest.approx(768 / 250 / seconds)
    assert row["st_samples_per_parameter_second"] == pytest.approx(6 / 1000 / seconds)
    assert found.pcu_flops == pytest.approx(6 * 768 * 250 / meter.seconds / 1e9)


def test_energy_is_power_times_time():
    began = time.perf_counter()
    meter = run([(0.1, {"generated": 5})], energy=[Gauge("package-0", lambda: 40.0 * (time.perf_counter() - began))])
    found = e.Efficiency(meter)
    assert found.energy_joules == pytest.approx(found.aec_watts * meter.seconds)
    assert found.aec_watts == pytest.approx(40, rel=0.05)
    assert found.row()["joules_per_token"] == pytest.approx(found.energy_joules / 5)
    assert "energy" not in found.not_measured


def test_what_is_not_measured_is_none_with_a_reason():
    gauges = [Gauge("gpu", why_not="no GPU")]
    row = e.Efficiency(run([(0.001, {"generated": 1})], gauges, probes.energy_gauges(powercap=probes.Path("/nowhere")))).row()
    assert row["aec_watts"] is None and row["energy_joules"] is None and row["joules_per_token"] is None
    assert row["not_measured"]["energy: cpu"] == "no energy counters in /nowhere"
    assert row["not_measured"]["memory: gpu"] == "no GPU"
    assert row["pcu_flops"] is None
    assert "gpu" not in row["amu_bytes"]


def test_the_processor_is_busy_or_it_is_not():
    idle = run([(0.2, {})])
    busy = e.Meter((), ())
    with busy, busy.iteration():
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
    assert e.Efficiency(idle).pcu_time < 0.5 / probes.cores()
    assert busy.cpu_seconds >= 0.2
    assert 0 < e.Efficiency(busy).pcu_time <= 1.05


def zone(root, place, name, microjoules, span=1000_000):
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_powercap_counters(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)  # inside the package
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:1", "psys", 5)  # around it
    gauges = [g for g in probes.energy_gauges(tmp_path) if not g.name.startswith("gpu")]
    assert [g.name for g in gauges] == ["package-0 (intel-rapl:0)", "dram (intel-rapl:0:1)"]
    first = [g.read() for g in gauges]
    (package / "energy_uj").write_text("100000")  # began anew at a million
    (memory / "energy_uj").write_text("2010")
    assert [g.read() - before for g, before in zip(gauges, first, strict=True)] == pytest.approx([0.2, 0.002])
    (memory / "energy_uj").unlink()
    assert probes._rapl(tmp_path)[0].read is None  # half of the machine would pass for all of it


def test_nvml_says_what_it_misses(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in probes._nvml()[0].why_not
    made = types.SimpleNamespace(
        NVMLError=RuntimeError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetTotalEnergyConsumption=lambda i: 5000 + i,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", made)
    assert [g.read() for g in probes._nvml()] == [5.0, 5.001]


def test_the_page_cache_holds_what_was_just_written(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(300_001))
    gauge = next(g for g in probes.memory_gauges([file]) if g.name == "page_cache")
    if gauge.read is None:
        pytest.skip(gauge.why_not)
    assert gauge.read() in (0, 300_001)  # a file system may keep none of it
    assert probes.cached_bytes(file) <= 300_001


def test_parameters_total_and_active(tiny_moe, tiny_dense):
    import moesaic

    model = moesaic.load(tiny_moe).model
    found = e.Parameters.of(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.active == found.total - experts // 2  # 2 of 4
    dense = moesaic.load(tiny_dense, dense_ok=True).model
    assert e.Parameters.of(dense) == e.Parameters(found := sum(p.numel() for p in dense.parameters()), found)


def test_held_bytes_of_experts_in_few_bits(tiny_moe):
    import moesaic
    from moesaic.view.quantize import quantize_model

    model = moesaic.load(tiny_moe).model
    before = e.held_bytes(model)
    assert before == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
    made = quantize_model(model, "int8")
    assert e.held_bytes(model) == before - made.stored_bytes + made.nbytes


def test_generation_is_measured_without_its_warm_up(tiny_moe):
    import moesaic

    model = moesaic.load(tiny_moe).model
    calls, waited = [], iter(range(100))
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    meter = e.Meter((), ())
    e.measure_generation(model, [[5, 6, 7], [8, 9]], 4, meter, waited=lambda: float(next(waited)), warm_up=1)
    handle.remove()
    assert len(calls) == 3 * 4  # a warm-up and two requests, each of exactly four tokens
    assert [(i.read, i.generated, i.waiting) for i in meter.iterations] == [(3, 4, 1.0), (2, 4, 1.0)]
    with pytest.raises(BadInput, match="takes 1 to 64"):
        e.measure_generation(model, [[5] * 61], 4, meter)


def test_the_command(tiny_moe, tiny_data, capsys):
    from moesaic.cli.main import main

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["eval", str(tiny_moe), "--efficiency", "--requests", "3", "--new-tokens", "5", *arguments])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    found = json.loads(call("--json")[1])
    row = found["efficiency"]
    assert row["iterations"] == 3 and row["it_tokens_per_second"] * row["al_seconds"] == pytest.approx(5)
    assert row["amu_bytes"]["weights"] == row["weight_bytes"]
    assert "bits_per_byte" not in found
    streamed = json.loads(call("--json", "--resident", "0.5")[1])["efficiency"]
    assert streamed["amu_bytes"]["weights"] < row["amu_bytes"]["weights"]
    assert (streamed["parameters"], streamed["active_parameters"]) == (row["parameters"], row["active_parameters"])
    assert streamed["al_waiting_seconds"] > 0 == row["al_waiting_seconds"]
    same = json.loads(call("--json", "--data", str(tiny_data), "--max-bytes", "300", "--against", str(tiny_moe))[1])
    assert same["efficiency"]["mcr"] == pytest.approx(1, rel=1e-6)
    code, out, _ = call("--data", str(tiny_data), "--max-bytes", "300")
    assert code == 0 and "AMU" in out and "bits/byte" in out
    for arguments, words in (
        (("--against", "x"), "give --data"), (("--requests", "0"), "--requests 0"), (("--new-tokens", "64"), "--new-tokens 64"),
    ):  # fmt: skip
        code, out, err = call(*arguments)
        assert code == 2 and words in err and not out

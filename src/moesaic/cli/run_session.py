"""One `moesaic run`: a loaded model, the conversation so far, what is printed, and what goes into JSON and page."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesaic import __version__
from moesaic.cli.loading import Opened, open_model
from moesaic.core.errors import NotMoE
from moesaic.core.files import write_atomically
from moesaic.report.run_page import Layer, RunPage
from moesaic.serving.describe import allow_packing, choose_threads, describe, packed_bytes
from moesaic.serving.generate import Generation, Sampling, encode, generate
from moesaic.serving.rounding import rounding_of
from moesaic.serving.stream import token_texts
from moesaic.serving.streamed.describe import logits_of, streaming_facts
from moesaic.serving.usage import LayerUsage, Recorder


class Session:
    """Answers prompts one after another. `turn` is the last answer, `usage` the routing that made it."""

    def __init__(
        self,
        name: str,
        opened: Opened,
        sampling: Sampling,
        out: Console,
        stream: TextIO | None,
        threads: int | None = None,
        streamed: Any = None,
    ) -> None:
        from moesaic.view import view

        self.name, self.model, self.tokenizer = name, opened.model, opened.tokenizer
        self.sampling, self.out, self.stream = sampling, out, stream
        allow_packing(opened.model)
        self.facts = describe(opened.model, opened.source, opened.rounding)
        self.facts["threads"], self.why_threads = choose_threads(self.facts, threads)
        try:
            self.recorder: Recorder | None = Recorder(view(opened.model))
        except NotMoE:
            self.recorder = None
        self.streamed = streamed
        self.lossy = None if streamed is None or streamed.engine.exact else streamed.engine.lossy
        self.facts["exact"] = self.facts["exact"] and self.lossy is None
        self.rounding = opened.rounding or rounding_of(opened.source)
        self.loss: dict[str, Any] = {}
        self.tuned: dict[str, Any] | None = None
        self.verified: dict[str, bool] | None = None
        self.streaming: dict[str, Any] = {}
        self.turn: Generation | None = None
        self.usage: list[LayerUsage] = []
        self.turns: list[dict[str, Any]] = []
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.steering: Any = None
        self.steers: list[str] = []
        self.notes: dict[str, Any] = {}

    def steer(self, steering: Any, words: list[str]) -> None:
        """Answer under a Steering from now on; `words` are how it was asked for. Raises BadInput where the model cannot."""
        self.steering = steering.bind(self.model, None if self.recorder is None else self.recorder.blocks, self.tokenizer)
        self.steers = words
        self.facts["exact"] = False

    def encode(self, text: str) -> list[int]:
        return encode(self.tokenizer, text)

    def answer(self, prompt_ids: list[int]) -> Generation:
        """Generate, streaming to the screen; raises BadInput when the prompt does not fit."""
        if self.recorder is None:
            self.turn = self._generate(prompt_ids)
        else:
            with self.recorder.recording():
                self.turn = self._generate(prompt_ids)
            self.usage = self.recorder.layers()
        self.facts["packed_bytes"] = packed_bytes()
        if self.streamed is not None:
            self.streaming = streaming_facts(self.streamed)
            self.facts["resident_bytes"] = self.streaming.pop("resident_bytes")
        self._write("\n")
        if self.turn.stopped in ("context full", "interrupted"):
            total = len(self.turn.prompt_ids) + len(self.turn.new_ids)
            self.out.print(f"[yellow]stopped: {self.turn.stopped} ({total:,} tokens)[/yellow]")
        return self.turn

    def _generate(self, prompt_ids: list[int]) -> Generation:
        if self.steering is None:
            return generate(self.model, self.tokenizer, prompt_ids, self.sampling, self._write)
        from moesaic.steering.generate import write

        recorder, refused = self.recorder, []  # type: ignore[var-annotated]

        def courses(found: list[Any]) -> None:
            if recorder is not None and found[0].tokens != 0:
                recorder.clear()  # the text so far is read again
                recorder.passes = 1 + len(found[0].beside)
            self.notes.update(found[0].notes)
            refused.extend(course.refused for course in found if course.refused is not None)

        call = partial(write, self.model, steer=self.steering, on_course=courses)
        turn = generate(self.model, self.tokenizer, prompt_ids, self.sampling, self._write, call)
        if refused:
            self.out.print(f"[yellow]no answer: {escape(refused[0])}[/yellow]")
        return replace(turn, stopped="abstained") if refused else turn

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()

    def chat(self, message: str) -> None:
        """Answer a message with the conversation before it; without a chat template, one text simply goes on."""
        templated = bool(getattr(self.tokenizer, "chat_template", None))
        if templated:
            messages = [*self.messages, {"role": "user", "content": message}]
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        else:
            ids = [*self.ids, *(self.encode(message) if not self.ids else self._more("\n" + message))]
        turn = self.answer(ids)
        self.ids = [*turn.prompt_ids, *turn.new_ids]
        self.messages += [{"role": "user", "content": message}, {"role": "assistant", "content": turn.text}]
        self.turns.append({"prompt": message, "text": turn.text, "tokens": len(turn.new_ids)})

    def _more(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def reset(self) -> None:
        self.messages, self.ids = [], []

    def show_facts(self) -> None:
        facts = self.facts
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        table.add_row("model", f"{escape(self.name)}, {facts['architecture']}, {facts['dtype']} on {facts['device']}")
        if facts["layers"]:
            active = f", {facts['active_parameters'] / 1e6:,.1f} M active per token"
            table.add_row("experts", f"{facts['layers']} MoE layers of {facts['experts']} experts, top {facts['top_k']}")
        else:
            active = ""
            table.add_row("experts", "none: a dense model")
        table.add_row("parameters", f"{facts['parameters'] / 1e6:,.1f} M{active}")
        table.add_row("bytes", f"{size(facts['resident_bytes'])} resident of {size(facts['total_bytes'])}")
        for kernel in facts["kernels"]:
            table.add_row("kernels", f"{kernel['backend']}: {kernel['reason']}")
        if facts["device"] == "cpu":
            table.add_row("threads", f"{facts['threads']}: {self.why_threads}")
        if self.steers:
            table.add_row("exact", f"[yellow]no: steered by {escape(', '.join(self.steers))}[/yellow]")
        elif self.lossy is not None:
            table.add_row("exact", f"[yellow]no: {escape(str(self.lossy))} changes which experts run[/yellow]")
        else:
            table.add_row(
                "exact", "yes: the weights as stored" if facts["exact"] else f"[yellow]no: {self._rounded()}[/yellow]"
            )
        self.out.print(table)

    def _rounded(self) -> str:
        """Why the weights are not those of the checkpoint."""
        return str(self.rounding) if self.rounding is not None else "weights rounded to a narrower dtype"

    def _inexact(self) -> str | None:
        if self.steers:
            return "steered by " + ", ".join(self.steers)
        return None if self.facts["exact"] else self._rounded()

    def show_prompt(self, text: str) -> None:
        self.out.print()
        if self.stream is not None:
            self.out.print(escape(text), style="bold", end="", highlight=False, soft_wrap=True)

    def show_table(self) -> None:
        turn = self.turn
        assert turn is not None
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("tokens", "first token", "tokens/s", "stopped"):
            table.add_column(name, justify="right")
        first = "-" if turn.time_to_first_token is None else f"{turn.time_to_first_token * 1000:,.0f} ms"
        rate = "-" if turn.tokens_per_second is None else f"{turn.tokens_per_second:,.1f}"
        table.add_row(f"{len(turn.prompt_ids):,} + {len(turn.new_ids):,}", first, rate, turn.stopped)
        self.out.print()
        self.out.print(table)
        if self.streaming:
            self._show_streaming()
        if not self.usage:
            return
        load = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("layer", "experts used", "max/mean load", "entropy", "busiest"):
            load.add_column(name, justify="right")
        for layer in self.usage:
            row = layer.summary()
            busiest = max(range(layer.num_experts), key=row["load"].__getitem__)
            load.add_row(
                str(layer.layer),
                f"{row['experts_used']} / {row['experts']}",
                f"{row['max_over_mean']:.2f}",
                f"{row['entropy']:.3f}",
                f"{busiest} ({row['load'][busiest] / max(1, sum(row['load'])):.0%})",
            )
        self.out.print()
        self.out.print(load)

    def verify(self, trust_remote_code: bool = False, data: str | None = None) -> None:
        """Run the resident model on the same text and say whether logits and tokens are the same; of a lossy mode, how far
        it is from exact routing on that text, or on `data`."""
        turn, streamed = self.turn, self.streamed
        assert turn is not None
        if self.lossy is not None:
            self._measure_loss(data)
            return
        ids = [*turn.prompt_ids, *turn.new_ids]
        resident = open_model(
            self.name, str(streamed.model.dtype).removeprefix("torch."), trust_remote_code=trust_remote_code
        ).model
        ours, theirs = (logits_of(model, ids) for model in (streamed.model, resident))
        again = generate(resident, self.tokenizer, turn.prompt_ids, self.sampling)
        self.verified = {
            "logits_equal": torch.equal(ours, theirs), "tokens_equal": again.new_ids[: len(turn.new_ids)] == turn.new_ids
        }  # fmt: skip
        for what, equal in self.verified.items():
            what = what.removesuffix("_equal")
            said = "[green]equal[/green]" if equal else "[red]differ[/red]"
            self.out.print(f"{what} of the streamed and the resident model: {said}")

    def _measure_loss(self, data: str | None) -> None:
        from moesaic.core.documents import read_documents
        from moesaic.serving.streamed.loss import measure
        from moesaic.trace import corpus

        assert self.turn is not None
        texts = [[*self.turn.prompt_ids, *self.turn.new_ids]]
        if data is not None:
            context = corpus.context_of(self.model.config, None)
            texts = [piece.ids for piece in corpus.pieces(read_documents(data), self.tokenizer, context)]
        self.loss = measure(self.streamed, texts).row()
        row = self.loss
        self.out.print(
            f"{escape(str(self.lossy))} against exact routing, {row['loss_tokens']:,} tokens, one per pass: "
            f"KL {row['kl_nats_per_token']:.4f} nats per token, {row['bits_per_byte']:.4f} bits per byte "
            f"({row['bits_per_byte_difference']:+.4f}), {row['overlap']:.1%} of the routers' choices ran, "
            f"hit rate {row['lossy_hit_rate']:.1%} (exact {row['exact_hit_rate']:.1%})",
            highlight=False,
        )

    def _show_streaming(self) -> None:
        row = self.streaming
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in ("policy", "hit rate", "read", "stall", "experts held", "peak memory"):
            table.add_column(name, justify="right")
        held = f"{size(row['expert_resident_bytes'])} of {size(row['expert_total_bytes'])}"
        table.add_row(
            escape(row["policy"]), f"{row['hit_rate']:.1%}", size(row["read_bytes"]), f"{row['stall_seconds']:.2f} s",
            held, size(row["peak_bytes"]),
        )  # fmt: skip
        self.out.print()
        self.out.print(table)
        if row["prefetched_bytes"]:
            self.out.print(
                f"read ahead {size(row['prefetched_bytes'])}: used {size(row['prefetch_used_bytes'])}, "
                f"in vain {size(row['prefetch_wasted_bytes'])}; {row['late']} came late"
            )
        if self.lossy is not None:
            self.out.print(
                f"[yellow]not exact: {escape(str(self.lossy))}; {row['overlap']:.1%} of the routers' choices ran[/yellow]"
            )

    def result(self, page: Path | None) -> dict[str, Any]:
        """The command's JSON object."""
        turn = self.turn
        assert turn is not None
        layers = [layer.summary() for layer in self.usage]
        facts = {k: v for k, v in self.facts.items() if k != "layers"}
        facts["resident_bytes"] += facts["packed_bytes"]
        return {
            "model": self.name,
            "layers": self.facts["layers"],
            **facts,
            "text": turn.text,
            "tokens": len(turn.new_ids),
            "prompt_tokens": len(turn.prompt_ids),
            "tokens_per_second": turn.tokens_per_second,
            "time_to_first_token_seconds": turn.time_to_first_token,
            "seconds": turn.seconds,
            "stopped": turn.stopped,
            "experts_used": [layer["experts_used"] for layer in layers],
            "load": layers,
            "page": None if page is None else str(page),
            **self.streaming,
            **(self.verified or {}),
            **self.loss,
            **({} if self.tuned is None else {"tune": self.tuned}),
            **({"steer": self.steers, "steer_notes": self.notes} if self.steers else {}),
            **({"turns": self.turns} if self.turns else {}),
        }

    def write_page(self, path: Path, command: str) -> Path:
        turn = self.turn
        assert turn is not None
        facts = self.facts
        rate = f"{turn.tokens_per_second:,.1f}" if turn.tokens_per_second else "-"
        first = f"first after {turn.time_to_first_token * 1000:,.0f} ms" if turn.time_to_first_token is not None else ""
        cells = [
            ("parameters", f"{facts['parameters'] / 1e6:,.1f} M", _active(facts)),
            ("MoE layers", str(facts["layers"]), ""),
            ("experts per layer", str(facts["experts"]), f"top {facts['top_k']}"),
            ("bytes resident", size(facts["resident_bytes"]), _beside(facts)),
            ("tokens", f"{len(turn.prompt_ids):,} + {len(turn.new_ids):,}", "prompt + new"),
            ("tokens per second", rate, first),
        ]
        if not facts["layers"]:
            cells = [cell for cell in cells if cell[0] not in ("MoE layers", "experts per layer")]
        kernels = "; ".join(f"{k['backend']} ({k['reason']})" for k in facts["kernels"])
        ids = [*turn.prompt_ids, *turn.new_ids]
        page = RunPage(
            title=self.name,
            architecture=facts["architecture"],
            intro=f"{len(turn.new_ids):,} new tokens; stopped: {turn.stopped}.",
            facts=cells,
            tokens=token_texts(self.tokenizer, ids),
            routed=min((layer.experts_TK.shape[0] for layer in self.usage), default=0),
            layers=[_layer(layer) for layer in self.usage],
            marks=[(0, "prompt"), (len(turn.prompt_ids), "answer")],
            made=_made(self.sampling, kernels, self._inexact(), self.lossy),
            command=command,
        )
        written = write_atomically(path, page.html())
        self.out.print(f"\npage: {escape(str(written))}", highlight=False)
        return written


def _layer(usage: LayerUsage) -> Layer:
    row = usage.summary()
    return Layer(
        usage.layer,
        usage.num_experts,
        usage.experts_TK.numpy(),
        usage.weights_TK.numpy(),
        row["load"],
        row["experts_used"],
        row["max_over_mean"],
        row["entropy"],
    )


def _active(facts: dict[str, Any]) -> str:
    return f"{facts['active_parameters'] / 1e6:,.1f} M active" if "active_parameters" in facts else ""


def _beside(facts: dict[str, Any]) -> str:
    packed = f" + {size(facts['packed_bytes'])} packed" if facts["packed_bytes"] else ""
    return f"of {size(facts['total_bytes'])}{packed}, {facts['dtype']}"


def _made(sampling: Sampling, kernels: str, rounded: str | None, lossy: Any = None) -> str:
    drawn = "the most likely token each time" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    parts = [f"moesaic {__version__}; {drawn}, seed {sampling.seed}"]
    if kernels:
        parts.append(f"kernels: {kernels}")
    if lossy is not None:
        parts.append(f"{lossy} changed which experts ran: not exact")
    else:
        parts.append("weights as stored" if rounded is None else f"{rounded}: not exact")
    return ". ".join(parts) + "."


def size(count: int) -> str:
    """Bytes for people: decimal units, as disks and networks count."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"

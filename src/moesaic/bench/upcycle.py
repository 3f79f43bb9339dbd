"""Upcycling measured: specialised dense models become one model in several ways, and learn on for equally many tokens.

A small dense seed is trained on all domains, copies of it on one domain each; then arms start from what each method makes of
them and are fine-tuned on the mixture by the same steps. All weights are made here: nothing is downloaded.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.bench import machine
from moesaic.core.documents import Document, read_documents, select
from moesaic.core.errors import BadInput
from moesaic.evaluation.bits_per_byte import report, score_documents
from moesaic.surgery.conversion import Told
from moesaic.surgery.convert import convert
from moesaic.training.finetune import finetune
from moesaic.view import load, resolve_model


@dataclass(frozen=True)
class Options:
    data: str = "../shared/data/corpus"
    domains: tuple[str, ...] = ("python", "prose", "math")
    width: int = 128
    layers: int = 4
    inner: int = 320
    seed_steps: int = 60
    branch_steps: int = 30
    steps: int = 20
    """Of every arm afterwards."""
    lr: float = 2e-3
    batch_size: int = 8
    seq_len: int = 128
    train_bytes: int = 400_000
    valid_bytes: int = 3000
    seed: int = 0
    arms: tuple[str, ...] = ()
    """Names of `_arms`; all where empty."""


STILL = ("twin", "arithmetic")
"""Arms that are not fine-tuned: their routers are trained when they are made."""


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Rows of every arm: bits per byte by domain before and after its steps."""
    header = machine.describe()
    texts = {name: _of(options, "train", name, options.train_bytes) for name in options.domains}
    valid = [document for name in options.domains for document in _of(options, "valid", name, options.valid_bytes)]
    mixture = [document for name in options.domains for document in texts[name]]
    with tempfile.TemporaryDirectory(prefix="moesaic-upcycle-") as folder:
        root = Path(folder)
        progress("the seed")
        seed = _fresh(options, root / "seed")
        _train(seed, mixture, options, options.seed_steps, options.lr)
        branches = []
        for name in options.domains:
            progress(f"a copy of it on {name}")
            branches.append(_copy(seed, root / name))
            _train(branches[-1], texts[name], options, options.branch_steps, options.lr / 2)
        rows = []
        for name, (said, make) in _arms(options, seed, branches, texts, root).items():
            if options.arms and name not in options.arms:
                continue
            progress(said)
            since, out = time.perf_counter(), root / f"arm-{name}"
            make(out)
            row: dict[str, Any] = {"impl": said, "seed": options.seed, "parameters": _size(out)}
            row["before"] = _score(out, valid, options)
            _train(out, mixture, options, 0 if name in STILL else options.steps, options.lr / 2)
            rows.append({**row, "after": _score(out, valid, options), "seconds": time.perf_counter() - since})
        alone = [
            {"impl": f"only {name}", "seed": options.seed, "before": _score(path, valid, options)}
            for name, path in zip(options.domains, branches, strict=True)
        ]
    return {"machine": header, "options": asdict(options), "rows": rows, "branches": alone}


def _arms(
    options: Options, seed: Path, branches: list[Path], texts: dict[str, list[Document]], root: Path
) -> dict[str, tuple[str, Callable[[Path], Any]]]:
    def averaged(out: Path) -> None:
        """The copies' mean: BTX whose every tensor is averaged, which `dense` then is."""
        convert(branches, root / "mixed", "btx", {"k": 2})
        convert([root / "mixed"], out, "dense", {"how": "average"})

    def fresh(out: Path) -> None:
        convert([seed], out, "sparse", {"experts": 4, "k": 2, "every": 1})
        model, tokenizer = load(out)
        torch.manual_seed(options.seed + 1)
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.data.normal_(0, 0.02)
            else:
                p.data.fill_(1.0 if "norm" in name else 0.0)
        shutil.rmtree(out)
        _write(model, tokenizer, out)

    def twin(out: Path, router: bool = True) -> None:
        """With its router, or with all tasks' differences off: task arithmetic."""
        given = {"tasks": list(options.domains), "density": 0.2}
        convert([seed, *branches], out, "twin_merging", given, told=Told(texts=texts, seq_len=options.seq_len))
        if not router:
            model, tokenizer = load(out, dense_ok=True)
            for p in model.twins.parameters():
                p.data.zero_()
            shutil.rmtree(out)
            _write(model, tokenizer, out)

    return {
        "dense": ("dense seed, continued", lambda out: _copy(seed, out)),
        "sparse": (
            "sparse of the seed",
            lambda out: convert([seed], out, "sparse", {"experts": 4, "k": 2, "every": 1}),
        ),
        "granular": (
            "granular of the seed",
            lambda out: convert([seed], out, "granular", {"granularity": 2, "experts": 8, "k": 4}),
        ),
        "scratch": ("sparse MoE from scratch", fresh),
        "average": ("average of the copies", averaged),
        "btx": ("btx of the copies", lambda out: convert(branches, out, "btx", {"k": 2})),
        "bam": ("bam of the copies", lambda out: convert(branches, out, "bam")),
        "arithmetic": ("task arithmetic, not tuned", lambda out: twin(out, router=False)),
        "twin": ("twin of the copies, not tuned", twin),
    }


def _of(options: Options, part: str, domain: str, most: int) -> list[Document]:
    found = [each for each in read_documents(Path(options.data) / part) if each.domain == domain]
    if not found:
        raise BadInput(f"{options.data}/{part} has no domain {domain!r}")
    return list(select(found, most))


def _fresh(options: Options, out: Path) -> Path:
    """An untrained dense Qwen3 with the bundled model's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled"))
    torch.manual_seed(options.seed)
    heads = max(1, options.width // 32)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=options.inner, num_hidden_layers=options.layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    _write(AutoModelForCausalLM.from_config(config), tokenizer, out)
    return out


def _copy(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    return out


def _write(model: Any, tokenizer: Any, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _train(folder: Path, documents: list[Document], options: Options, steps: int, lr: float) -> None:
    """In place: trained on, and written again."""
    if not steps:
        return
    model, tokenizer = load(folder, dense_ok=True)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = True  # with its load loss
    finetune(
        model, tokenizer, {"text": documents}, model.parameters(), steps=steps, lr=lr, batch_size=options.batch_size,
        seq_len=options.seq_len, seed=options.seed,
    )  # fmt: skip
    shutil.rmtree(folder)
    _write(model, tokenizer, folder)


def _score(folder: Path, valid: list[Document], options: Options) -> dict[str, float]:
    model, tokenizer = load(folder, dense_ok=True)
    total = report("", score_documents(model, tokenizer, valid, context=options.seq_len))
    domains = {name: row["bits_per_byte"] for name, row in total["domains"].items()}
    return {"mean": sum(domains.values()) / len(domains), **domains}


def _size(folder: Path) -> int:
    return sum(p.numel() for p in load(folder, dense_ok=True).model.parameters())

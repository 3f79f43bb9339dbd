"""`moesaic.load`: a checkpoint as a live model, with our kernels, or one clear error."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from moesaic.core.errors import BadInput, NotMoE
from moesaic.store.packed import read_packed
from moesaic.view import discover, files, implementation, packed, quantised

BUNDLED = "bundled"

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}


class Loaded(NamedTuple):
    """A model in eval mode and its tokenizer (None where the checkpoint has none)."""

    model: Any
    tokenizer: Any


def resolve_model(name_or_path: str | Path) -> str | Path:
    """What a MODEL names: the shipped model for "bundled", a local folder as a Path, else a hub id as a str.

    Raises BadInput for a file, a missing folder, or a hub id while the hub is switched off.
    """
    name = str(name_or_path)
    if name == BUNDLED:
        folder = Path(str(resources.files("moesaic"))) / "models" / "bundled"
        if not (folder / "config.json").is_file():
            raise BadInput("the bundled model is not installed: reinstall moesaic, or name a model folder or hub id")
        return folder
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BadInput(f"{path} is a file: name the model folder that holds it")
    hub_id = (
        not isinstance(name_or_path, Path) and name.count("/") <= 1 and name[:1] not in ("", ".", "/", "~") and "\\" not in name
    )
    if not hub_id:
        raise BadInput(f"no such model folder: {path}")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not _cached(name):
        raise BadInput(f"no folder {name!r} here, and HF_HUB_OFFLINE is set, so it is not looked up on the hub")
    return name


def load(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    experts: str | None = implementation.NAME,
    attention: str | None = None,
    trust_remote_code: bool = False,
    dense_ok: bool = False,
    allow_pickle: bool = False,
    adapt: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        path_or_id: a folder (never looked up on the hub), a hub id, or "bundled".
        dtype: "auto" (as stored), a name such as "bfloat16" or "bf16", or a torch dtype.
        experts: the experts implementation: "moesaic", or one of transformers' ("eager", "grouped_mm", ...).
        dense_ok: load a model without experts instead of raising NotMoE.
        allow_pickle: accept pickled weights (`.bin`), which can run code.
        adapt: given the model's class, the class whose `from_pretrained` loads it instead.

    Raises BadInput, before any weight is read where it can be known then.
    """
    dtype = parse_dtype(dtype)
    source = resolve_model(path_or_id)
    records = None
    if isinstance(source, Path):
        files.read_config(source)
        files.check_weights(source, allow_pickle)
        records = read_packed(source) if adapt is None else None
    common = {"trust_remote_code": trust_remote_code, "local_files_only": isinstance(source, Path)}
    config = _config(source, common)
    if not dense_ok:
        _require_moe(config, trust_remote_code, source)
    if attention is not None:
        kwargs["attn_implementation"] = attention
    if experts is not None:
        kwargs["experts_implementation"] = experts
    model_class = _model_class(config, trust_remote_code)
    own_class = model_class
    if adapt is not None:
        model_class = adapt(model_class)
    if records is not None:
        kwargs |= quantised.widening(files.read_config(records.folder), source)
        elsewhere = device is not None and torch.device(device).type != "cpu"
        model_class = packed.with_experts(model_class, records, widened=elsewhere or experts != implementation.NAME)
    try:
        model, info = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **common,
            **kwargs,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise BadInput(f"cannot load {source}: {_first_line(error)}") from error
    if records is not None:
        model.__class__ = own_class
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise BadInput(f"{source} has no tensor {missing[0]} ({len(missing)} missing), which {type(model).__name__} needs")
    if not dense_ok and not any(discover.is_experts(module) for module in model.modules()):
        raise _not_moe(type(model).__name__, source)
    model.eval()
    if device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise BadInput(f"device {device}: {_first_line(error)}") from error
    return Loaded(model, _tokenizer(source, common))


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of what a MODEL names, without the model. Raises BadInput where there is none."""
    source = resolve_model(path_or_id)
    found = _tokenizer(source, {"trust_remote_code": False, "local_files_only": isinstance(source, Path)})
    if found is None:
        raise BadInput(f"{path_or_id} has no tokenizer: put its tokenizer files beside config.json")
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers: for commands that say in their own words what they do."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype from its name; "auto" stays. Raises BadInput for a name that is no floating dtype."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, _DTYPES.get(dtype, dtype.removeprefix("torch.")), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadInput(f"unknown dtype {dtype!r}: one of auto, float32, bfloat16, float16 (or fp32, bf16, fp16)")
    return found


def _config(source: str | Path, common: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(source, **common)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = files.read_config(source).get("model_type") if isinstance(source, Path) else None
        if kind is not None and kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
            raise BadInput(f"{source}: unknown architecture {kind!r} (transformers {transformers.__version__})") from error
        if isinstance(source, str) and isinstance(error, OSError):
            raise BadInput(f"no model folder {source!r} here, and the hub gave none: {_first_line(error)}") from error
        raise BadInput(f"cannot read the configuration of {source}: {_first_line(error)}") from error


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that saved the checkpoint, else the causal language model of its configuration, else its base model."""
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or type(config) not in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM if remote else AutoModel
    own = AutoModelForCausalLM._model_mapping[type(config)]
    return own if isinstance(own, type) else AutoModelForCausalLM


def _require_moe(config: Any, trust_remote_code: bool, source: str | Path) -> None:
    """Build the model without memory, so that a dense one is refused before its weights are read."""
    try:
        model_class = _model_class(config, trust_remote_code)
        with torch.device("meta"):
            build = getattr(model_class, "from_config", None) or model_class._from_config
            model = build(config)
    except Exception:  # whatever this skeleton needs that is not here: the loaded model is checked again
        return
    if not any(discover.is_experts(module) for module in model.modules()):
        raise _not_moe(type(model).__name__, source)


def _not_moe(name: str, source: str | Path) -> NotMoE:
    return NotMoE(f"{source} is a {name}, which has no Mixture-of-Experts block; allow dense models to run it anyway")


def _tokenizer(source: str | Path, common: dict[str, Any]) -> Any:
    # transformers makes up an empty tokenizer for a folder that has none
    if isinstance(source, Path) and not any(source.glob("tokenizer*")) and not any(source.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **common)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""MODEL on the command line to a model and its tokenizer, with errors that name what is wrong."""

from __future__ import annotations

from typing import Any

from moesaic.core.errors import BadInput

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype!r}: one of {', '.join(DTYPES)}")
    return dtype


def quiet_transformers() -> None:
    """Progress and advice of transformers would land between our lines; its errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_model(name: str, dtype: str, dense_ok: bool, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, a hub id or `bundled`."""
    check_dtype(dtype)
    quiet_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)

"""llama.cpp through llama-cpp-python, run by an interpreter that has it: `python llama_cpp.py FILE.gguf THREADS`."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # this file's own name must not hide the package


class Llama:
    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: it is called as long as we live
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        how = llama_cpp.llama_model_default_params()
        how.n_gpu_layers = 0
        how.use_extra_bufts = False  # repacked weights would be a second copy in memory
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), how)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        room = llama_cpp.llama_context_default_params()
        room.n_ctx, room.n_batch, room.n_threads, room.n_threads_batch = 2048, 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, room)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _run(self, ids: list[int]) -> None:
        tokens = (self.api.llama_token * len(ids))(*ids)
        code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def prefill(self, ids: list[int]) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self._run(ids)

    def step(self, token: int) -> None:
        self._run([token])

    def top(self) -> list[int]:
        logits = self.api.llama_get_logits_ith(self.context, -1)[: self.vocabulary]
        return sorted(range(self.vocabulary), key=lambda i: -logits[i])[:10]

    def facts(self) -> dict[str, Any]:
        return {"version": self.api.__version__}


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from loop import answer

    del sys.path[0]
    answer(lambda: Llama(sys.argv[1], int(sys.argv[2])))

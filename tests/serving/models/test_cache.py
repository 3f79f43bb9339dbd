"""Models in tiers of memory: real tiny models, moved, dropped and read again."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.serving.models.cache import CachedModel, ModelCache, Tier

SIZE = 4 * 8 * 8


class Shelf:
    """A disk of linear models, each with weights of its own: counts reads, and what of them is still alive."""

    def __init__(self, names):
        self.reads = []
        self.alive = weakref.WeakSet()
        self.models = [CachedModel(n, SIZE, lambda n=n: self.read(n), measure, pinned=n == "router") for n in names]

    def read(self, name):
        gc.collect()
        self.reads.append(name)
        layer = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            layer.weight.fill_(len(name) + ord(name[0]))
        self.alive.add(layer)
        return layer


def measure(model):
    return sum(p.nbytes for p in model.parameters())


def test_one_tier_holds_whole_models_and_never_more():
    shelf = Shelf("abc")
    cache = ModelCache(shelf.models, [Tier("ram", 2 * SIZE)])
    for name in "abacab":
        with cache.use(name) as model:
            assert model.weight[0, 0] == 1 + ord(name)
        del model  # or this test would keep it alive
        assert len(shelf.alive) == len(cache.resident()) <= 2
        assert cache.used_bytes() == len(cache.resident()) * SIZE
    assert shelf.reads == ["a", "b", "c", "b"]
    assert (cache.stats[0].hits, cache.stats[0].loads, cache.stats[0].evictions) == (2, 4, 2)
    cache.close()
    assert not cache.resident() and not shelf.alive


def test_weights_that_were_changed_are_dropped_not_written():
    shelf = Shelf("ab")
    cache = ModelCache(shelf.models, [Tier("ram", SIZE)])
    with cache.use("a") as model, torch.no_grad():
        model.weight.zero_()
    del model
    with cache.use("b"):
        assert len(shelf.alive) == 1
    with cache.use("a") as model:
        assert model.weight[0, 0] == 1 + ord("a")


def test_two_tiers_read_once_and_copy_after():
    shelf = Shelf("abc")
    cache = ModelCache(shelf.models, [Tier("device", SIZE), Tier("ram", 3 * SIZE)])
    for name in "abcabc":
        with cache.use(name) as model:
            assert model.weight[0, 0] == 1 + ord(name)
            assert model is not cache._held[1][name]  # a copy: the tiers are different memories
        assert cache.used_bytes(0) == SIZE
    assert shelf.reads == ["a", "b", "c"]
    assert (cache.stats[0].loads, cache.stats[1].loads) == (6, 3)
    assert cache.stats[1].hits == 3


def test_the_router_stays():
    shelf = Shelf(["router", "a", "b"])
    cache = ModelCache(shelf.models, [Tier("ram", 2 * SIZE)])
    for name in ("router", "a", "b", "a", "b"):
        with cache.use(name):
            assert "router" in cache.resident()
    assert shelf.reads.count("router") == 1
    with pytest.raises(BadInput, match="beside the pinned router"):
        ModelCache(shelf.models, [Tier("ram", 2 * SIZE - 1)])


def test_models_in_use_stay():
    shelf = Shelf("abc")
    cache = ModelCache(shelf.models, [Tier("ram", 2 * SIZE)])
    with cache.use("a"), cache.use("b"):
        assert not cache.can_enter("c")
        with pytest.raises(BadInput, match="no room for c"):
            cache.acquire("c")
    with cache.use("c"):
        assert "a" not in cache.resident()


def test_a_load_that_fails_leaves_room():
    shelf = Shelf("ab")
    broken = CachedModel("broken", SIZE, lambda: 1 / 0)
    large = CachedModel("large", SIZE, lambda: nn.Linear(8, 9), measure)
    cache = ModelCache([*shelf.models, broken, large], [Tier("ram", SIZE)])
    with pytest.raises(ZeroDivisionError):
        cache.acquire("broken")
    with pytest.raises(MoesaicError, match="large takes 324 B, 256 B were kept"):
        cache.acquire("large")
    assert cache.resident() == [] and cache.used_bytes() == 0
    with cache.use("a"):
        pass


def test_a_model_that_is_there_does_not_wait_for_one_that_comes():
    shelf = Shelf("a")
    loading, finish = threading.Event(), threading.Event()

    def slow():
        loading.set()
        assert finish.wait(20)
        return shelf.read("z")

    cache = ModelCache([*shelf.models, CachedModel("z", SIZE, slow)], [Tier("ram", 2 * SIZE)])
    with cache.use("a"):
        pass
    thread = threading.Thread(target=lambda: cache.release(cache.acquire("z") and "z"))
    thread.start()
    assert loading.wait(20)
    with cache.use("a") as model:
        assert model is not None and not cache.is_ready("z")
    finish.set()
    thread.join(20)
    assert cache.is_ready("z")


def test_room_that_was_reserved_is_nobody_elses():
    shelf = Shelf("abc")
    cache = ModelCache(shelf.models, [Tier("ram", 2 * SIZE)])
    for name in "ab":
        with cache.use(name):
            pass
    bring = cache.reserve("c")
    assert not cache.is_ready("a") and not cache.is_ready("c")
    with cache.use("b"), pytest.raises(BadInput, match="no room"):
        cache.acquire("a")
    with pytest.raises(BadInput, match="being loaded"):
        cache.reserve("c")
    assert bring().weight[0, 0] == 1 + ord("c")
    assert cache.reserve("c")() is cache._held[0]["c"]


def test_what_cannot_be():
    shelf = Shelf("ab")
    with pytest.raises(BadInput, match="no model 'q'"):
        ModelCache(shelf.models, [Tier("ram", SIZE)]).acquire("q")
    with pytest.raises(BadInput, match="same name"):
        ModelCache([*shelf.models, shelf.models[0]], [Tier("ram", SIZE)])
    with pytest.raises(BadInput, match="at least one tier"):
        ModelCache(shelf.models, [])
    with pytest.raises(BadInput, match="lowest tier is on cuda"):
        ModelCache(shelf.models, [Tier("gpu", SIZE, "cuda")])
    with pytest.raises(BadInput, match="know the future"):
        ModelCache(shelf.models, [Tier("ram", SIZE)], policy="belady")

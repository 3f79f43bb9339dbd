from __future__ import annotations

import pytest

from moesaic.core import registry
from moesaic.core.errors import UnknownMethod


def test_file_name_is_the_registered_name():
    single = [e for e in registry.entries() if e.family in ("routing", "experts", "balancing")]
    assert len(single) > 25
    for entry in single:
        assert entry.build.__module__ == f"{registry.FAMILIES[entry.family]}.{entry.name}"


def test_every_entry_says_what_it_is():
    for entry in registry.entries():
        assert entry.summary.endswith("."), entry
        assert entry.card, entry


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownMethod, match=r"no routing method 'topq'.*topk"):
        registry.get("routing", "topq")
    with pytest.raises(UnknownMethod, match="unknown family"):
        registry.get("router", "topk")


def test_a_name_cannot_be_taken_twice():
    registry.get("routing", "topk")
    with pytest.raises(ValueError, match="registered by"):

        @registry.register("routing", "topk", card="x")
        class Other: ...

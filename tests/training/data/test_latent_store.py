"""How many latents are kept in memory, and how many pictures are encoded at once."""

import pytest
from indomain_guidance.training.data import latent_store
from indomain_guidance.training.data.latent_store import at_once


@pytest.mark.parametrize("free, room", [(8 * 2**30, 2 * 2**30), (2**40, 8 * 2**30), (4, 1), (None, 2 * 2**30)])
def test_a_quarter_of_free_memory_is_used_and_never_more_than_8_gib(monkeypatch, free, room):
    monkeypatch.setattr(latent_store, "available_memory", lambda: free)
    assert latent_store.default_room() == room


def test_large_pictures_are_encoded_fewer_at_once():
    assert [at_once(8, (side, side)) for side in (64, 512, 768, 1024, 2048)] == [8, 8, 3, 2, 1]
    assert at_once(1, (4096, 4096)) == 1

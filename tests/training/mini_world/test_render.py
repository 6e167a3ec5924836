"""The two worlds: pictures are what their labels say."""

import numpy as np
import pytest
import torch
from indomain_guidance.training.mini_world import render, tokens


def test_pictures_have_the_colours_of_their_labels():
    pictures = render.rendered(32, torch.Generator().manual_seed(0))
    palette = render.palette()
    for image, ink, ground in zip(pictures.images, pictures.ink, pictures.ground):
        assert torch.allclose(image[:, 0, 0], palette[ground])  # digits keep away from the corner
        distance = (image - palette[ink][:, None, None]).abs().sum(0)
        assert float(distance.min()) < 0.05, "somewhere the ink is full"


def test_ink_never_equals_ground_and_all_56_pairs_exist():
    pairs = render.colour_pairs()
    assert len(pairs) == 56 and bool((pairs[:, 0] != pairs[:, 1]).all()) and len(pairs.unique(dim=0)) == 56


def test_the_handwriting_domain_has_16_pairs_and_shares_none_with_the_foreign_ones():
    own = {tuple(pair) for pair in render.domain_pairs("handwriting").tolist()}
    foreign = {tuple(pair) for pair in render.foreign_pairs().tolist()}
    assert len(own) == 16 and len(foreign) == 16 and not own & foreign
    narrow = render.domain_pairs("narrow").tolist()
    assert [[render.COLOUR_NAMES[i] for i in pair] for pair in narrow] == [["white", "black"]]
    with pytest.raises(ValueError, match="handwriting"):
        render.domain_pairs("porcelain")


def test_equal_seeds_draw_equal_pictures_and_other_seeds_others():
    first, again, other = (render.rendered(8, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)


def test_held_out_fonts_and_rows_are_not_trained_on():
    trained, held_out = render.load_glyphs(False), render.load_glyphs(True)
    assert len(trained) == 80 and len(held_out) == 16
    assert not {font.numpy().tobytes() for font in trained} & {font.numpy().tobytes() for font in held_out}
    assert render.TRAIN_ROWS.stop == render.HELD_OUT_ROWS.start
    assert len(render.load_handwriting(render.HELD_OUT_ROWS)[0]) == 2000


def test_captions_are_english_and_can_leave_parts_out():
    red, orange, yellow = (render.COLOUR_NAMES.index(name) for name in ("red", "orange", "yellow"))
    assert render.caption(7, red, yellow) == "a red seven on a yellow background"
    assert render.caption(8, orange, None) == "an orange eight"
    assert render.caption(8, None, orange) == "an eight on an orange background"
    assert render.caption(None, red, None) == "a red digit"
    words = {
        word
        for d in (None, *range(10))
        for i in (None, *range(8))
        for g in (None, *range(8))
        for word in render.caption(d, i, g).split()
    }
    assert words == set(tokens.TOKEN_IDS)


def test_the_ink_of_white_on_black_pictures_repaints_them_exactly():
    masks = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    pictures = render.paint(masks, render.domain_pairs("narrow").expand(3, 2))
    assert torch.allclose(render.ink_of(pictures), masks, atol=1e-6)


def test_the_page_of_the_data_names_every_font_with_its_version():
    listed = (render.DATA / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    with np.load(render.DATA / "glyphs.npz") as data:
        fonts = [f"{name} {version}" for name, version in zip(data["names"], data["versions"])]
        assert set(data["licences"].tolist()) == {"OFL-1.1", "Apache-2.0"}
    assert len(fonts) == 96 and not [font for font in fonts if font not in listed]

"""Caption words as CLIP tokens, against core ComfyUI's own tokenizer."""

import torch
from indomain_guidance.training.mini_world import render, tokens


def test_every_caption_gets_the_ids_core_gives_it(core):
    tokenizer = core("comfy.sd1_clip").SD1Tokenizer()
    red, orange = render.COLOUR_NAMES.index("red"), render.COLOUR_NAMES.index("orange")
    captions = ["", *(render.caption(d, red, orange) for d in range(10))]
    captions += [render.caption(None, i, None) for i in range(8)]
    for text in captions:
        ids = [token for token, weight in tokenizer.tokenize_with_weights(text)["l"][0]]
        assert tokens.tokenize(text).tolist() == ids, text


def test_all_words_of_the_captions_have_a_token():
    words = " ".join(("a an digit on background", *render.DIGITS, *render.COLOUR_NAMES)).split()
    assert set(words) == set(tokens.TOKEN_IDS)


def test_unknown_words_share_one_row_and_known_ones_keep_theirs():
    compact = torch.arange(tokens.ROWS, dtype=torch.float32)[:, None]
    full = tokens.expand_embedding(compact, tokens.ROW_IDS)
    ids = tokens.tokenize("a red porcelain seven")
    assert torch.equal(full[ids], compact[tokens.to_rows(ids)])
    assert full[ids[3], 0] == tokens.UNKNOWN_ROW and full.shape == (49408, 1)
